"""`route` and `merge`: adapters by name, alone and mixed."""

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.spec import syntax
from lora_fx.spec.adapters import RESERVED, name_faults
from lora_fx.spec.blocks import MERGE, ROUTE
from lora_fx.spec.closest import did_you_mean
from lora_fx.spec.evaluate import evaluate, no_environment
from lora_fx.spec.expressions import show
from lora_fx.spec.names import Names
from lora_fx.spec.rule import number
from lora_fx.spec.scopes import MERGE_BLOCK, ROUTE_BLOCK, WEIGHT
from lora_fx.spec.settings import Settings
from lora_fx.spec.spec import MergeSpec, Mix, RouteSpec, Term
from lora_fx.spec.token_routing import arrow_faults, arrow_of

_ARGUMENT = "adapter_names"


class Mixes:
    """Resolve what refers to adapters; faults go to the diagnostics of `names`.

    `adapters` are the names of the file's adapters, `merges` its merges by name.
    """

    def __init__(
        self,
        names: Names,
        settings: Settings,
        adapters: Iterable[str],
        merges: Mapping[str, syntax.Merge],
    ) -> None:
        self._names = names
        self._settings = settings
        self._adapters = tuple(adapters)
        self._merges = merges
        self._diagnostics = names.diagnostics

    def route(self, route: syntax.Route) -> RouteSpec:
        """Return what a `route` statement says."""
        values = self._settings.constant(_attributes(route.items), ROUTE, ROUTE_BLOCK)
        whens: dict[str, syntax.When] = {}
        default: syntax.Otherwise | None = None
        for item in route.items:
            if isinstance(item, syntax.When):
                self._check_when(item, whens)
                whens.setdefault(item.name.text, item)
            elif isinstance(item, syntax.Otherwise):
                if default is not None:
                    self._twice("`default` stands in `route` once", item.span, default.span)
                default = default or item
        by = values["by"]
        arrow = arrow_of(by, route)
        if arrow is not None:
            self._diagnostics += arrow_faults(arrow, route)
            for name in dict.fromkeys(arrow.general):
                self._check_named(name, arrow.span)
        return RouteSpec(
            by.argument("name") if by is not None and arrow is None else _ARGUMENT,
            values["slots"],
            values["max_rank"],
            values["train"],
            {name: self._mix(when.mix, base=True) for name, when in whens.items()},
            self._mix(default.mix, base=True) if default else None,
            route.span,
            arrow,
        )

    def merges(self) -> tuple[MergeSpec, ...]:
        """Return the merges, each after those it takes from."""
        resolved = {name: self._merge(name, merge) for name, merge in self._merges.items()}
        needs = {
            name: [term.name for term in merge.mix.terms if term.name in resolved]
            for name, merge in resolved.items()
        }
        try:
            return tuple(resolved[name] for name in TopologicalSorter(needs).static_order())
        except CycleError as error:
            first = self._merges[error.args[1][0]]
            around = " → ".join(f"`{name}`" for name in reversed(error.args[1]))
            message = f"merge `{first.name.text}` takes from itself"
            self._diagnostics.append(Diagnostic("cyclic-merge", message, first.span, around))
            return ()

    def _merge(self, name: str, merge: syntax.Merge) -> MergeSpec:
        self._diagnostics += name_faults(merge.name)
        values = self._settings.constant(_attributes(merge.items), MERGE, MERGE_BLOCK)
        froms = [item for item in merge.items if isinstance(item, syntax.From)]
        for again in froms[1:]:
            self._twice("`from` stands in a merge once", again.span, froms[0].span)
        if not froms:
            message = f"merge `{name}` takes from no adapter"
            help = "write `from 1.0 * one + 0.5 * other`"
            self._diagnostics.append(Diagnostic("no-source", message, merge.span, help=help))
        rank, into = values["rank"], values["into"]
        if rank is not None and into is not None:
            message = "`rank` compresses an adapter; this merge goes into the base"
            self._diagnostics.append(Diagnostic("cannot-apply", message, merge.span))
        return MergeSpec(
            name,
            self._mix(froms[0].mix, base=False) if froms else Mix((), merge.span),
            values["method"],
            None if rank is None else rank.argument("rank"),
            into is not None,
            into is not None and into.argument("dequantize") is True,
            values["save"],
            values["dtype"].name if values["dtype"] else None,
            merge.span,
        )

    def _mix(self, mix: syntax.Mix, base: bool) -> Mix:
        alone = len(mix.terms) == 1 and mix.terms[0].weight is None and mix.terms[0].sign == "+"
        if base and alone and mix.terms[0].name.text in RESERVED:
            return Mix((), mix.span)
        terms: dict[str, Term] = {}
        for term in mix.terms:
            name, span = term.name.text, term.name.span
            self._check_term(name, span)
            if name in terms:
                self._twice(f"`{name}` stands in this mix twice", span, terms[name].span)
            terms.setdefault(name, Term(name, self._weight(term), span))
        return Mix(tuple(terms.values()), mix.span)

    def _weight(self, term: syntax.Term) -> float:
        expr = term.weight and self._names.resolve(term.weight, WEIGHT)
        if expr is None:
            return -1.0 if term.sign == "-" else 1.0
        try:
            value = evaluate(expr, no_environment)
        except LoraFxError as error:
            self._diagnostics += error.diagnostics
            return 1.0
        if number(value):
            return (-1.0 if term.sign == "-" else 1.0) * float(value)  # type: ignore[arg-type]
        message = "a weight must be a finite number"
        label = f"is {show(value)}"
        self._diagnostics.append(Diagnostic("wrong-value", message, expr.span, label))
        return 1.0

    def _check_term(self, name: str, span: Span) -> None:
        if name in RESERVED:
            message = "`base` stands alone, without weight or other terms"
            self._diagnostics.append(Diagnostic("base-in-mix", message, span))
        else:
            self._check_named(name, span)

    def _check_named(self, name: str, span: Span) -> None:
        if name in self._merges and name not in self._kept_merges():
            message = f"merge `{name}` goes into the base; no adapter is left of it"
            self._diagnostics.append(Diagnostic("unknown-adapter", message, span))
        elif name not in self._adapters and name not in self._merges:
            message = f"there is no adapter `{name}`"
            help = did_you_mean(name, (*self._adapters, *self._merges))
            self._diagnostics.append(Diagnostic("unknown-adapter", message, span, help=help))

    def _kept_merges(self) -> list[str]:
        """Return the merges that make an adapter."""
        return [
            name
            for name, merge in self._merges.items()
            if not any(attribute.name.text == "into" for attribute in _attributes(merge.items))
        ]

    def _check_when(self, when: syntax.When, known: Mapping[str, syntax.When]) -> None:
        name, span = when.name.text, when.name.span
        if name in known:
            self._twice(f"`when {show(name)}` is there already", span, known[name].name.span)
        elif name in RESERVED or name in self._adapters or name in self._merges:
            message = f"`{name}` always stands for itself"
            help = "give the mix another name"
            self._diagnostics.append(Diagnostic("reserved-name", message, span, help=help))
        elif not name:
            self._diagnostics.append(Diagnostic("bad-name", "the name of a mix is empty", span))

    def _twice(self, message: str, again: Span, first: Span) -> None:
        there = ((first, "the first one"),)
        self._diagnostics.append(Diagnostic("duplicate-statement", message, again, secondary=there))


def _attributes(items: Iterable[object]) -> tuple[syntax.Attribute, ...]:
    return tuple(item for item in items if isinstance(item, syntax.Attribute))
