"""The values of `let`: in any order, each from the others."""

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.spec.evaluate import evaluate, no_environment
from lora_fx.spec.expressions import Value, references
from lora_fx.spec.names import Names
from lora_fx.spec.scopes import CONSTANT
from lora_fx.spec.syntax import Let


def evaluate_constants(lets: Mapping[str, Let], diagnostics: list[Diagnostic]) -> Names:
    """Return the values by name, adding all faults; a constant at fault has the value None."""
    values: dict[str, Value | None] = {}
    names = Names(values, diagnostics)
    for name in _in_order(lets, values, diagnostics):
        expr = names.resolve(lets[name].value, CONSTANT)
        try:
            values[name] = None if expr is None else evaluate(expr, no_environment)
        except LoraFxError as error:
            diagnostics += error.diagnostics
            values[name] = None
    return names


def _in_order(
    lets: Mapping[str, Let], values: dict[str, Value | None], diagnostics: list[Diagnostic]
) -> list[str]:
    """Return the names, each after those it needs; those on a cycle get the value None instead."""
    needs = {
        name: {str(r) for r in references(let.value) if str(r) in lets}
        for name, let in lets.items()
    }
    while True:
        try:
            return list(TopologicalSorter(needs).static_order())
        except CycleError as error:
            cycle: list[str] = error.args[1][1:]
            first = min(cycle, key=lambda name: lets[name].span.start)
            label = "needs " + ", ".join(f"`{name}`" for name in sorted(needs[first] & set(cycle)))
            message = f"constant `{first}` depends on itself"
            diagnostics.append(Diagnostic("cyclic-value", message, lets[first].name.span, label))
            values.update(dict.fromkeys(cycle))
            needs = {n: needed - set(cycle) for n, needed in needs.items() if n not in cycle}
