"""Match a rule's selector against a model's modules and parameters."""

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.modules import Modules
from lora_fx.plan.stacks import Stack
from lora_fx.spec.expressions import quote
from lora_fx.spec.patterns import BadPattern, matcher
from lora_fx.spec.selectors import Atom, Range, Selector

Condition = Callable[[str], bool]


def select(
    selector: Selector,
    optional: bool,
    modules: Modules,
    holds: Condition,
    diagnostics: list[Diagnostic],
    taken: Sequence[str] = (),
) -> list[str]:
    """Return the dotted names that a selector selects, in module order, and note what is wrong.

    Names of modules, and with `parameter "…"` of parameters. Each atom is judged alone first: one
    that matches nothing is an error at the atom (a note if the rule is `optional`). One that the
    clauses empty is a note; a rule that selects nothing, an error. Modules that are `taken`, and
    what is inside them, are left out.
    """
    try:
        return _select(selector, optional, modules, holds, diagnostics, taken)
    except LoraFxError as error:
        diagnostics += error.diagnostics
        return []


def _select(
    selector: Selector,
    optional: bool,
    modules: Modules,
    holds: Condition,
    diagnostics: list[Diagnostic],
    taken: Sequence[str],
) -> list[str]:
    excluded = _excluded(selector, optional, modules, diagnostics)
    stack = None
    if selector.layers is not None:
        stack = _stack(selector, modules, diagnostics)
        beyond = _beyond(selector.layers, stack) if stack else []
        diagnostics += beyond
        if stack is None or beyond:
            return []
    chosen: set[str] = set()
    emptied = []
    for atom in selector.atoms:
        matched = match(atom, modules)
        if not matched:
            diagnostics.append(_unmatched(atom, modules, optional))
            continue
        inside = [f for f in matched if _in_layers(selector, f, stack)]
        kept = [name for name in inside if name not in excluded and holds(name)]
        free = [name for name in kept if not is_inside(name, taken)]
        if not free:
            emptied.append(_emptied(atom, len(matched), bool(kept)))
        chosen.update(free)
    if emptied and not chosen:
        diagnostics.append(_selects_nothing(selector, optional, emptied))
    else:
        diagnostics += emptied
    return [name for name in (*modules.by_fqn, *modules.parameters) if name in chosen]


def match(atom: Atom, modules: Modules) -> list[str]:
    """Return the names that an atom matches by itself; modules fit under any of their names.

    Raises LoraFxError for a regex that takes too long.
    """
    try:
        return _match(atom, modules)
    except BadPattern as error:
        message = f"`{atom}` is not a pattern that can be used"
        diagnostic = Diagnostic("bad-pattern", message, atom.span, str(error))
        raise LoraFxError((diagnostic,)) from error


def _match(atom: Atom, modules: Modules) -> list[str]:
    if atom.kind == "linear":
        return [fqn for fqn in modules.by_fqn if fqn in modules.linears]
    fits = matcher(atom)
    if atom.kind == "parameter":
        return [name for name in modules.parameters if fits(name)]
    if atom.kind == "class":
        return [fqn for fqn, module in modules.by_fqn.items() if fits(type(module).__name__)]
    names = modules.aliases.items()
    return [fqn for fqn, aliases in names if any(map(fits, aliases))]


def _excluded(
    selector: Selector, optional: bool, modules: Modules, diagnostics: list[Diagnostic]
) -> set[str]:
    """Return what the `except` atoms take away: a module's parameters go with it."""
    excluded: set[str] = set()
    for atom in selector.excludes:
        matched = match(atom, modules)
        owned = [f for f in modules.parameters if f.rpartition(".")[0] in matched]
        if atom.kind in ("name", "glob", "regex"):
            owned += filter(matcher(atom), modules.parameters)
        if not matched and not owned:
            diagnostics.append(_unmatched(atom, modules, optional))
        excluded.update(matched, owned)
    return excluded


def _in_layers(selector: Selector, fqn: str, stack: Stack | None) -> bool:
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


def is_inside(name: str, fqns: Iterable[str]) -> bool:
    """Whether a module or parameter is one of these modules, or stands inside one."""
    return any(name == fqn or name.startswith(f"{fqn}.") for fqn in fqns)


def _emptied(atom: Atom, count: int, trained: bool) -> Diagnostic:
    why = "`train` takes what is left of them" if trained else "the rule's clauses leave none"
    return Diagnostic(
        "emptied-target",
        f"`{atom}` selects nothing here",
        atom.span,
        f"matched {count} module{'s' * (count != 1)}, and {why}",
        severity="note",
    )


def _selects_nothing(
    selector: Selector, optional: bool, emptied: Sequence[Diagnostic]
) -> Diagnostic:
    return Diagnostic(
        "empty-target",
        f"`{selector.text}` selects no module",
        selector.span,
        emptied[0].label if len(emptied) == 1 else "the patterns match, and the clauses leave none",
        severity="note" if optional else "error",
    )
