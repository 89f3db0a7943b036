"""Match a rule's selector against a model's modules and parameters."""

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.plan.meant_patterns import meant
from lora_fx.plan.modules import Modules
from lora_fx.plan.names import first_failing
from lora_fx.plan.selector_faults import (
    emptied,
    layer_range,
    no_stack,
    selects_nothing,
    unmatched,
)
from lora_fx.plan.stacks import Stack
from lora_fx.spec.patterns import BadPattern, matcher
from lora_fx.spec.selectors import Atom, Range, Selector
from lora_fx.spec.spec import QuantizeSpec, Target, Train

_CLAUSE = re.compile(r'\bin\s+layers(\s+of\s+"[^"]*")?\s*\[\s*\Z')
_WORDS = {Target: "target", Train: "train", QuantizeSpec: "quantize"}


@dataclass(frozen=True)
class Selection:
    """The dotted names that a statement selects, in module order.

    `left_out` is what its patterns match and something takes away: a clause, or a `train`
    statement, which stands there.
    """

    statement: Target | Train | QuantizeSpec
    names: tuple[str, ...] = ()
    left_out: Mapping[str, Span] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The statement as written, on one line, without its block."""
        mark = "?" if _is_optional(self.statement) else ""
        return f"{_WORDS[type(self.statement)]}{mark} {self.statement.selector.text}"


def select(
    statement: Target | Train | QuantizeSpec,
    modules: Modules,
    diagnostics: list[Diagnostic],
    taken: Mapping[str, Span] | None = None,
) -> Selection:
    """Return what a statement selects, and note what is wrong.

    Names of modules, and with `parameter "…"` of parameters. Each atom is judged alone first: one
    that matches nothing is an error at the atom (a note if the rule is optional). One that the
    clauses empty is a note; a rule that selects nothing, an error. Modules that are `taken`, and
    what is inside them, are left out.
    """
    try:
        return _select(statement, modules, diagnostics, taken or {})
    except LoraFxError as error:
        diagnostics += error.diagnostics
        return Selection(statement)


def _select(
    statement: Target | Train | QuantizeSpec,
    modules: Modules,
    diagnostics: list[Diagnostic],
    taken: Mapping[str, Span],
) -> Selection:
    selector, optional = statement.selector, _is_optional(statement)
    clause = _clause_against(selector, optional, modules, diagnostics)
    if clause is None:
        return Selection(statement)
    chosen: set[str] = set()
    left_out: dict[str, Span] = {}
    emptied_atoms = []
    for atom in selector.atoms:
        matched = match(atom, modules)
        if not matched:
            diagnostics.append(_unmatched(atom, modules, optional))
            continue
        against = {name: clause(name) for name in matched}
        kept = [name for name, span in against.items() if span is None]
        inside = {name: taken[fqn] for name in kept if (fqn := outermost(name, taken)) is not None}
        left_out |= {name: span for name, span in against.items() if span is not None} | inside
        if len(inside) == len(kept):
            emptied_atoms.append(emptied(atom, len(matched), bool(kept)))
        chosen.update(kept)
    chosen -= left_out.keys()
    if emptied_atoms and not chosen:
        diagnostics.append(selects_nothing(selector, optional, emptied_atoms))
    else:
        diagnostics += emptied_atoms
    names = (name for name in (*modules.by_fqn, *modules.parameters) if name in chosen)
    return Selection(statement, tuple(names), left_out)


def _is_optional(statement: Target | Train | QuantizeSpec) -> bool:
    return not isinstance(statement, QuantizeSpec) and statement.optional


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


def _unmatched(atom: Atom, modules: Modules, optional: bool) -> Diagnostic:
    return unmatched(atom, modules, meant(atom, modules, _match), optional)


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


def _clause_against(
    selector: Selector, optional: bool, modules: Modules, diagnostics: list[Diagnostic]
) -> Callable[[str], Span | None] | None:
    """Return what finds the first clause against a name; None if `in layers` is at fault."""
    excluded = _excluded(selector, optional, modules, diagnostics)
    failing = first_failing(selector.conditions, modules)
    if selector.layers is None:
        return lambda name: excluded.get(name) or failing(name)
    ranges, stack = selector.layers, _stack(selector, modules)
    if stack is None:
        diagnostics.append(no_stack(selector, modules))
        return None
    beyond = [layer_range(r, len(stack.layers)) for r in ranges if r.last >= len(stack.layers)]
    diagnostics += beyond
    clause = _whole_clause(ranges)

    def against(name: str) -> Span | None:
        if not _in_layers(name, stack, ranges):
            return clause
        return excluded.get(name) or failing(name)

    return None if beyond else against


def _whole_clause(ranges: tuple[Range, ...]) -> Span:
    """Return where `in layers` stands, from its first word to its bracket."""
    source, start, end = ranges[0].span.source, ranges[0].span.start, ranges[-1].span.end
    head = _CLAUSE.search(source.text, 0, start)
    return Span(source, head.start() if head else start, source.text.find("]", end) + 1 or end)


def _excluded(
    selector: Selector, optional: bool, modules: Modules, diagnostics: list[Diagnostic]
) -> dict[str, Span]:
    """Return what the `except` atoms take away: a module's parameters go with it."""
    excluded: dict[str, Span] = {}
    for atom in selector.excludes:
        matched = set(match(atom, modules))
        owned = [f for f in modules.parameters if f.rpartition(".")[0] in matched]
        if atom.kind in ("name", "glob", "regex"):
            owned += filter(matcher(atom), modules.parameters)
        if not matched and not owned:
            diagnostics.append(_unmatched(atom, modules, optional))
        excluded |= dict.fromkeys((*matched, *owned), atom.span)
    return excluded


def _stack(selector: Selector, modules: Modules) -> Stack | None:
    """Return the stack that `in layers` is about: the one it names, or the only one."""
    if selector.stack is None:
        return modules.stacks[0] if len(modules.stacks) == 1 else None
    return next((stack for stack in modules.stacks if stack.fqn == selector.stack), None)


def _in_layers(name: str, stack: Stack, ranges: tuple[Range, ...]) -> bool:
    if not name.startswith(f"{stack.fqn}."):
        return False
    index = int(name[len(stack.fqn) + 1 :].partition(".")[0])
    return any(
        (part.start or 0) <= index and (part.end is None or index < part.end) for part in ranges
    )


def outermost(name: str, fqns: Container[str]) -> str | None:
    """Return which of these modules a module or parameter is or stands inside, or None."""
    found = None
    while name:
        found = name if name in fqns else found
        name = name.rpartition(".")[0]
    return found


def is_inside(name: str, fqns: Container[str]) -> bool:
    """Whether a module or parameter is one of these modules, or stands inside one."""
    return outermost(name, fqns) is not None
