"""What a pattern that matches nothing was meant to be: one of another kind that does match."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches

from lora_fx.plan.folding import numberless
from lora_fx.plan.modules import Modules
from lora_fx.spec.patterns import BadPattern
from lora_fx.spec.selectors import Atom

_ALL_LINEAR = ("all-linear", "all_linear")
Match = Callable[[Atom, Modules], Sequence[str]]


def meant(atom: Atom, modules: Modules, match: Match) -> Atom | None:
    """Return the same pattern as another kind if that matches, else the closest that there is."""
    for other in _other_kinds(atom):
        try:
            if match(other, modules):
                return other
        except BadPattern:
            continue
    return _closest(atom, modules)


def _other_kinds(atom: Atom) -> Iterator[Atom]:
    pattern = atom.pattern
    if pattern in _ALL_LINEAR:
        yield replace(atom, kind="linear", pattern="linear")
    if atom.kind != "name" and re.fullmatch(r"[A-Za-z_]\w*", pattern):
        yield replace(atom, kind="name")
    if atom.kind in ("glob", "parameter"):
        yield replace(atom, pattern=f"**.{pattern}")
    if atom.kind == "regex":
        yield replace(atom, kind="glob")
    if atom.kind == "glob":
        yield replace(atom, kind="regex")
    if atom.kind in ("glob", "name"):
        yield replace(atom, kind="class")


def _closest(atom: Atom, modules: Modules) -> Atom | None:
    """Return the closest of the atom's own kind: a name, a class, a pattern of the whole name."""
    match atom.kind:
        case "name":
            known = {fqn.rpartition(".")[2] for fqn in modules.by_fqn}
        case "class":
            known = {type(module).__name__ for module in modules.by_fqn.values()}
        case "parameter":
            known = {numberless(name) for name in modules.parameters}
        case _:
            known = {numberless(fqn) for fqn in modules.by_fqn}
    close = get_close_matches(atom.pattern, sorted(known), n=1, cutoff=0.5)
    if not close:
        return None
    kind = "glob" if atom.kind == "regex" else atom.kind
    return replace(atom, kind=kind, pattern=close[0])
