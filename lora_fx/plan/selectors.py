"""Match a rule's selector against a model's modules."""

import re
from collections.abc import Callable
from difflib import get_close_matches

from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.modules import Modules
from lora_fx.plan.modules import linear_modules as linear_modules
from lora_fx.plan.stacks import Stack
from lora_fx.spec.selectors import Atom, Range, Selector, glob_to_regex
from lora_fx.spec.spec import Target

Condition = Callable[[str], bool]


def select(
    target: Target, modules: Modules, holds: Condition, diagnostics: list[Diagnostic]
) -> list[str]:
    """Return the fqns a target selects, in module order, and note what is wrong with it.

    Each atom is judged alone first: one that matches no module is an error at the atom (a note
    with `target?`). One that the clauses empty is a note; a rule that selects nothing, an error.
    """
    selector = target.selector
    excluded: set[str] = set()
    for atom in selector.excludes:
        matched = match(atom, modules)
        if not matched:
            diagnostics.append(_unmatched(atom, modules, optional=False))
        excluded.update(matched)
    stack = None
    if selector.layers is not None:
        stack = _stack(selector, modules, diagnostics)
        if stack is None:
            return []
        beyond = _beyond(selector.layers, stack)
        if beyond:
            diagnostics += beyond
            return []
    chosen: set[str] = set()
    emptied = []
    for atom in selector.atoms:
        matched = match(atom, modules)
        if not matched:
            diagnostics.append(_unmatched(atom, modules, target.optional))
            continue
        inside = [f for f in matched if _in_layers(selector, f, stack, modules)]
        kept = [fqn for fqn in inside if fqn not in excluded and holds(fqn)]
        if not kept:
            emptied.append(_emptied(atom, len(matched)))
        chosen.update(kept)
    if emptied and not chosen:
        diagnostics.append(_selects_nothing(target))
    else:
        diagnostics += emptied
    return [fqn for fqn in modules.by_fqn if fqn in chosen]


def match(atom: Atom, modules: Modules) -> list[str]:
    """Return the fqns of the modules that an atom matches by itself, under any of their names."""
    if atom.kind == "linear":
        return [fqn for fqn in modules.by_fqn if fqn in modules.linears]
    if atom.kind == "name":
        fits = re.compile(rf"(?:.*\.)?{re.escape(atom.pattern)}")
    else:
        fits = glob_to_regex(atom.pattern)
    names = modules.aliases.items()
    return [fqn for fqn, aliases in names if any(fits.fullmatch(alias) for alias in aliases)]


def _in_layers(selector: Selector, fqn: str, stack: Stack | None, modules: Modules) -> bool:
    if stack is None or selector.layers is None:
        return True
    if not fqn.startswith(f"{stack.fqn}."):
        return False
    index = int(fqn[len(stack.fqn) + 1 :].partition(".")[0])
    return any(
        (part.start or 0) <= index and (part.end is None or index < part.end)
        for part in selector.layers
    )


def _stack(selector: Selector, modules: Modules, diagnostics: list[Diagnostic]) -> Stack | None:
    """Return the stack that `in layers` is about; without one, note why."""
    stacks = {stack.fqn: stack for stack in modules.stacks}
    if selector.stack is None and len(stacks) == 1:
        return modules.stacks[0]
    if selector.stack in stacks:
        return stacks[selector.stack]
    if not stacks:
        message, help = "the model has no stack of layers", None
    elif selector.stack is None:
        message = "the model has several stacks of layers"
        help = f'name one: `in layers of "{modules.stacks[0].fqn}"`'
    else:
        message = f"`{selector.stack}` is no stack of layers"
        help = "name one of the stacks"
    notes = ("the stacks are " + ", ".join(f"`{fqn}`" for fqn in stacks),) if stacks else ()
    diagnostics.append(
        Diagnostic("ambiguous-stack", message, selector.span, notes=notes, help=help)
    )
    return None


def _beyond(ranges: tuple[Range, ...], stack: Stack) -> list[Diagnostic]:
    count = len(stack.layers)
    return [layer_range(part, count) for part in ranges if part.last >= count]


def layer_range(part: Range, count: int) -> Diagnostic:
    """Return the fault of a range that reaches beyond the last layer."""
    message = f"`{part.span.text}` reaches beyond the last layer"
    return Diagnostic("layer-range", message, part.span, f"the layers are 0..{count}")


def _unmatched(atom: Atom, modules: Modules, optional: bool) -> Diagnostic:
    return Diagnostic(
        "unmatched-target",
        f"`{atom}` matches no module of the model",
        atom.span,
        f"matched 0 of {len(modules.by_fqn)} modules",
        help=_closest_pattern(atom, modules),
        severity="note" if optional else "error",
    )


def _closest_pattern(atom: Atom, modules: Modules) -> str | None:
    if atom.kind == "name":
        known = {fqn.rpartition(".")[2] for fqn in modules.by_fqn}
    else:
        known = {re.sub(r"\.\d+(?=\.|$)", ".*", fqn) for fqn in modules.by_fqn}
    close = get_close_matches(atom.pattern, sorted(known), n=1, cutoff=0.5)
    if not close:
        return None
    return f'did you mean `"{close[0]}"`?' if atom.kind == "glob" else f"did you mean `{close[0]}`?"


def _emptied(atom: Atom, count: int) -> Diagnostic:
    return Diagnostic(
        "emptied-target",
        f"`{atom}` selects nothing here",
        atom.span,
        f"matched {_modules(count)}, and the rule's clauses leave none",
        severity="note",
    )


def _selects_nothing(target: Target) -> Diagnostic:
    return Diagnostic(
        "empty-target",
        f"`{target.selector.text}` selects no module",
        target.selector.span,
        "the patterns match, and the clauses leave none",
        severity="note" if target.optional else "error",
    )


def _modules(count: int) -> str:
    return "1 module" if count == 1 else f"{count} modules"
