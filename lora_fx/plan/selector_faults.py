"""What is wrong with a selector on a model, in words."""

from collections.abc import Sequence

from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.modules import Modules
from lora_fx.spec.selectors import Atom, Range, Selector


def unmatched(atom: Atom, modules: Modules, meant: Atom | None, optional: bool) -> Diagnostic:
    """Return that an atom matches nothing, and what it may have been meant to be."""
    parameters = atom.kind == "parameter"
    count = len(modules.parameters if parameters else modules.by_fqn)
    what = "parameter" if parameters else "module"
    return Diagnostic(
        "unmatched-target",
        f"`{atom}` matches no {what} of the model",
        atom.span,
        f"matched 0 of {count} {what}s",
        help=None if meant is None else _help(atom, meant),
        severity="note" if optional else "error",
    )


def _help(atom: Atom, meant: Atom) -> str:
    quoted = atom.kind == "glob" and meant.kind == "name"
    return f"did you mean `{meant}`{', without quotes' * quoted}?"


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
