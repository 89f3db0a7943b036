"""The lock of a spec beside it: of `style.lora` it is `style.lora.lock`, JSON with sorted keys."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.lock import Lock, from_json, lock_of
from lora_fx.spec.spec import Spec
from lora_fx.spec.whole_file import write_whole

if TYPE_CHECKING:
    from lora_fx.plan.plan import Plan


def lock_path(spec: Spec) -> Path | None:
    """Return where the lock of a spec lies, or would; None for a spec that is no file."""
    return spec.path.with_name(f"{spec.path.name}.lock") if spec.path else None


def read_lock(spec: Spec) -> Lock | None:
    """Return the lock that lies beside a spec, or None.

    Raises LoraFxError, with a warning, if it cannot be read.
    """
    path = lock_path(spec)
    if path is None or not path.exists():
        return None
    try:
        return from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"`{path}` is no lock file that can be read"
        reason = f"{type(error).__name__}: {error}"
        help = f"write it anew: `lora-fx plan {spec.source.name} --lock`"
        diagnostic = Diagnostic("bad-lock", message, None, "", (), (reason,), help, "warning")
        raise LoraFxError((diagnostic,)) from error


def write_lock(plan: "Plan") -> Path:
    """Write a plan's lock beside its spec, whole or not at all.

    Raises LoraFxError if it cannot be written, or if the spec is no file.
    """
    path = lock_path(plan.spec)
    if path is None:
        message = "a spec that is no file has no place for a lock"
        raise LoraFxError((Diagnostic("unwritable-file", message),))
    text = json.dumps(lock_of(plan).to_json(), indent=2, sort_keys=True, ensure_ascii=False)
    try:
        path.touch()
        write_whole(path, f"{text}\n".encode())
    except OSError as error:
        reason = error.strerror or str(error)
        diagnostic = Diagnostic("unwritable-file", f"`{path}` cannot be written", notes=(reason,))
        raise LoraFxError((diagnostic,)) from error
    return path
