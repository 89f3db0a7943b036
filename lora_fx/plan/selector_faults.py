"""What is wrong with a selector on a model, in words."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.modules import Modules
from lora_fx.spec.expressions import quote
from lora_fx.spec.selectors import Atom, Range, Selector


def unmatched(atom: Atom, modules: Modules, optional: bool) -> Diagnostic:
    """Return that an atom matches nothing, and what it may have meant."""
    parameters = atom.kind == "parameter"
    count = len(modules.parameters if parameters else modules.by_fqn)
    what = "parameter" if parameters else "module"
    return Diagnostic(
        "unmatched-target",
        f"`{atom}` matches no {what} of the model",
        atom.span,
        f"matched 0 of {count} {what}s",
        help=_closest_pattern(atom, modules),
        severity="note" if optional else "error",
    )


def _closest_pattern(atom: Atom, modules: Modules) -> str | None:
    """Suggest what is of the atom's own kind: a name, a class, a pattern of the whole name."""
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
    word = atom.kind if atom.kind in ("class", "parameter") else ""
    shown = close[0] if atom.kind == "name" else f"{word} {quote(close[0])}".strip()
    return f"did you mean `{shown}`?"


def numberless(name: str) -> str:
    """Return a dotted name with `*` in the place of its numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def emptied(atom: Atom, count: int, trained: bool) -> Diagnostic:
    """Return that the clauses leave nothing of what an atom matches."""
    why = "`train` takes what is left of them" if trained else "the rule's clauses leave none"
    return Diagnostic(
        "emptied-target",
        f"`{atom}` selects nothing here",
        atom.span,
        f"matched {count} module{'s' * (count != 1)}, and {why}",
        severity="note",
    )


def selects_nothing(
    selector: Selector, optional: bool, emptied: Sequence[Diagnostic]
) -> Diagnostic:
    """Return that nothing is left of a whole rule."""
    return Diagnostic(
        "empty-target",
        f"`{selector.text}` selects no module",
        selector.span,
        emptied[0].label if len(emptied) == 1 else "the patterns match, and the clauses leave none",
        severity="note" if optional else "error",
    )


def layer_range(part: Range, count: int) -> Diagnostic:
    """Return the fault of a range that reaches beyond the last layer."""
    message = f"`{part.span.text}` reaches beyond the last layer"
    return Diagnostic("layer-range", message, part.span, f"the layers are 0..{count}")


def no_stack(selector: Selector, modules: Modules) -> Diagnostic:
    """Return that `in layers` is about no stack of the model, or about several."""
    stacks = [stack.fqn for stack in modules.stacks]
    if not stacks:
        message, help = "the model has no stack of layers", None
    elif selector.stack is None:
        message = "the model has several stacks of layers"
        help = f'name one: `in layers of "{stacks[0]}"`'
    else:
        message = f"`{selector.stack}` is no stack of layers"
        help = "name one of the stacks"
    notes = ("the stacks are " + ", ".join(f"`{fqn}`" for fqn in stacks),) if stacks else ()
    return Diagnostic("ambiguous-stack", message, selector.span, notes=notes, help=help)
