"""Start from an artifact: its adapters and, where it is trusted and fits, its compiled code."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_fx.adapters.peft.kept_weights import with_weights
from lora_fx.adapters.peft.keys import expected_shapes, ranks_of
from lora_fx.adapters.peft.plain import read_origins
from lora_fx.adapters.peft.starts import base_faults
from lora_fx.adapters.peft.write import TENSORS
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.plan import Plan
from lora_fx.plan.ranks import with_ranks
from lora_fx.plan.rules import AdapterPlan
from lora_fx.runtime.artifact import layout
from lora_fx.runtime.artifact.ahead import AheadFunction, load_ahead
from lora_fx.runtime.artifact.base import load_seen_from
from lora_fx.runtime.artifact.kernels import put_in_place
from lora_fx.runtime.artifact.key import differences, key_of
from lora_fx.runtime.artifact.manifest import Manifest, damaged, read_manifest
from lora_fx.runtime.artifact.precompiled import Modes, Precompiled
from lora_fx.runtime.artifact.trust import is_trusted
from lora_fx.runtime.artifact.vector_isa import accept_loaded
from lora_fx.runtime.units.unit import Compiled

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Artifact:
    """An artifact whose files are what they were written as; nothing of its code has run."""

    folder: Path
    manifest: Manifest

    @staticmethod
    def open(folder: Path) -> "Artifact":
        """Read an artifact. Raises LoraFxError naming each file that is damaged."""
        return Artifact(folder, read_manifest(folder))

    @property
    def spec(self) -> Path:
        """The file of its spec."""
        return self.folder / layout.SPEC

    def load_base(self, trust_cache: bool) -> PreTrainedModel:
        """Load the model that it was made for, on the device.

        Raises LoraFxError if there is none, or if it has code of its own that is not trusted.
        """
        if self._base_has_code() and not self._is_trusted(trust_cache):
            message = f"the base of `{self.folder}` has code of its own, which is not trusted"
            note = "this user of this machine did not write the artifact"
            help = "load the model and pass it: `base=model`, or say `trust_cache=True`"
            raise LoraFxError((Diagnostic("no-model", message, notes=(note,), help=help),))
        return load_seen_from(self.manifest.model, self.folder, self.manifest.device)

    def adapters(self, model: nn.Module, plan: Plan) -> dict[str, Mapping[str, Tensor]]:
        """Return the tensors of each adapter by their names in a PEFT folder.

        Raises LoraFxError if they are not those that the plan has on the model.
        """
        places = {a.name: self.folder / layout.ADAPTERS / a.name for a in plan.adapters}
        paths = {name: place / TENSORS for name, place in places.items()}
        unheld = [p for p in paths.values() if self._name(p) not in self.manifest.files]
        if unheld:
            raise LoraFxError([damaged(path, "there is no hash of it") for path in unheld])
        found: dict[str, Mapping[str, Tensor]] = {n: load_file(path) for n, path in paths.items()}
        for planned in plan.adapters:
            of_eva = [site.fqn for site in planned.sites if site.init.name == "eva"]
            ranks = ranks_of(found[planned.name])
            adapter = with_ranks(planned, {fqn: ranks.get(fqn, 0) for fqn in of_eva})
            here = expected_shapes(adapter, model)
            there = {name: tuple(t.shape) for name, t in found[adapter.name].items()}
            self._require_same(here, there)
            self._require_base(adapter, model, paths[adapter.name])
            tensors = found[adapter.name]
            found[adapter.name] = with_weights(adapter, tensors, places[adapter.name], model)
        return found

    def _require_base(self, adapter: AdapterPlan, model: nn.Module, path: Path) -> None:
        faults = base_faults(adapter, read_origins(path), model)
        found = [Diagnostic(code, message, notes=(f"in `{path}`",)) for code, message in faults]
        if found:
            raise LoraFxError(found)

    def _require_same(self, here: Shapes, there: Shapes) -> None:
        differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        if differing:
            name = differing[0]
            message = f"the artifact `{self.folder}` was made for another model"
            shapes = f"{there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
            more = (f"likewise for {len(differing) - 1} more",) if len(differing) > 1 else ()
            notes = (f"`{name}` is {shapes}", *more)
            help = "compile the spec for this model: `lora-fx compile`"
            diagnostic = Diagnostic("artifact-other-model", message, notes=notes, help=help)
            raise LoraFxError((diagnostic,))

    def serve(self, model: Any, trust_cache: bool) -> None:
        """Let a model, compiled of the spec, call the compiled code that is here.

        Code that is not trusted, or that is for something else than this model in this process, is
        passed over with a warning; the model compiles anew then.
        """
        if not self.manifest.key:
            return
        reason = self._reason_against(model, trust_cache)
        if reason:
            warnings.warn(f"{reason}: the model compiles anew", stacklevel=3)
            return
        kernels = put_in_place(self._kernels())
        if self.manifest.device == "cpu":
            accept_loaded({path for path in kernels if path.suffix == ".so"})
        units = [module for module in model.modules() if isinstance(module, Compiled)]
        if self.manifest.functions:
            unit = Precompiled(units[0].lora_fx_unit, self._functions)  # type: ignore[arg-type]
            for module in units:
                module.lora_fx_unit = unit

    def _reason_against(self, model: Any, trust_cache: bool) -> str | None:
        if not self._is_trusted(trust_cache):
            return (
                f"the compiled code of `{self.folder}` was not written by this user of this "
                "machine, and is not trusted without `trust_cache=True`"
            )
        text = self.spec.read_text(encoding="utf-8")
        key = key_of(model, text, self.manifest.device)
        other = differences(self.manifest.key, key)
        return f"the compiled code of `{self.folder}` is for another {_listed(other)}" * bool(other)

    def _is_trusted(self, trust_cache: bool) -> bool:
        return trust_cache or is_trusted(self.manifest.code_digest())

    def _base_has_code(self) -> bool:
        place = self.manifest.model
        return place is not None and bool(place["trust_remote_code"])

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _kernels(self) -> Iterator[tuple[str, bytes]]:
        prefix = f"{layout.KERNELS}/"
        for name in self.manifest.files:
            if name.startswith(prefix):
                yield name.removeprefix(prefix), self._checked(name)

    def _functions(self, modes: Modes) -> Iterator[AheadFunction]:
        of_modes = (f for f in self.manifest.functions if (f.training, f.grad) == modes)
        loaded = (load_ahead(self._checked(function.file)) for function in of_modes)
        return (function for function in loaded if function is not None)

    def _checked(self, name: str) -> bytes:
        """Return a file's bytes if they are what they were when the artifact was opened."""
        data = (self.folder / name).read_bytes()
        if sha256(data).hexdigest() != self.manifest.files[name]:
            raise RuntimeError(f"`{self.folder / name}` has changed since it was read")
        return data


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
