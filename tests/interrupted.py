"""Fail, or die, at each thing that a piece of code does: every call, every change to the disk."""

import gc
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

_PACKAGE = Path(__file__).parent.parent / "lora_fx"
_CHANGING = ("adapters/", "runtime/", "compiler/", "spec/together.py", "spec/whole_folder.py")
_CALLERS = tuple(str(_PACKAGE / part) for part in _CHANGING)
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod")
_hook: list[Callable[[str], None] | None] = []


class Injected(OSError):
    """What goes wrong in these tests."""


def disk_changes(run: Callable[[], object]) -> int:
    """How many times `run` changes something on the disk."""
    seen: list[str] = []
    with _watching(seen.append):
        run()
    return len(seen)


@contextmanager
def at_disk_change(number: int, then: Callable[[], object]) -> Iterator[None]:
    """Do `then` when the block is about to change the disk for the `number`-th time."""
    seen: list[str] = []

    def count(event: str) -> None:
        seen.append(event)
        if len(seen) == number + 1:
            then()

    with _watching(count):
        yield


def fail() -> None:
    raise Injected("injected")


@contextmanager
def _watching(see: Callable[[str], None]) -> Iterator[None]:
    if not _hook:
        _hook.append(None)
        sys.addaudithook(_audit)
    _hook[0] = see
    try:
        yield
    finally:
        _hook[0] = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    see = _hook[0]
    if see is not None and (event in _CHANGES or (event == "open" and _writes(args))):
        see(event)


def _writes(args: tuple[Any, ...]) -> bool:
    _, mode, flags = args
    return any(c in (mode or "") for c in "wax+") or bool(
        (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )


Step = tuple[str, int]


def steps(run: Callable[[], object]) -> list[Step]:
    """The first and the last time that `run` calls each function.

    Counted are calls from those parts of the package that change models or the disk: reading a spec
    and planning are one step each.
    """
    counts: Counter[str] = Counter()
    _profiled(run, lambda name: counts.update([name]))
    return [step for name, n in counts.items() for step in sorted({(name, 1), (name, n)})]


def fail_at(run: Callable[[], object], step: Step) -> None:
    """Run until a function is called for the n-th time, which then raises."""
    counts: Counter[str] = Counter()

    def see(name: str) -> None:
        counts.update([name])
        if (name, counts[name]) == step:
            raise Injected(f"injected at {step}")

    _profiled(run, see)


@cache
def _changes(code: CodeType) -> bool:
    return code.co_filename.startswith(_CALLERS)


def _is_weak_callback(code: CodeType) -> bool:
    return code.co_name == "<lambda>" and "weak" in code.co_qualname.lower()


def _profiled(run: Callable[[], object], see: Callable[[str], None]) -> None:
    def profile(frame: Any, event: str, arg: Any) -> None:
        caller = frame.f_code if event == "c_call" else frame.f_back and frame.f_back.f_code
        if caller is None or not _changes(caller):
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR or _is_weak_callback(frame.f_code):
            return  # they come when something is freed, too, at no place in particular
        if event == "call":
            see(f"{frame.f_code.co_qualname} from {caller.co_qualname}")
        elif event == "c_call" and arg.__name__ != "__exit__":
            see(f"{getattr(arg, '__qualname__', arg)} from {caller.co_qualname}")

    gc.disable()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
