"""`by = arrow(…)` in `route`: each token gets its own adapters."""

from collections.abc import Iterator

from lora_fx.diagnostics import Diagnostic, Span
from lora_fx.spec import syntax
from lora_fx.spec.expressions import Word
from lora_fx.spec.spec import ArrowSpec


def arrow_of(by: Word | None, route: syntax.Route) -> ArrowSpec | None:
    """Return what `by` says of tokens; None where samples are routed."""
    if by is None or by.name != "arrow":
        return None
    values = dict(by.arguments)
    general = values.get("general", ())
    assert isinstance(general, tuple)
    top, temperature = values["top"], values["temperature"]
    return ArrowSpec(top, float(temperature), general, _attribute(route, "by"))  # type: ignore[arg-type]


def arrow_faults(arrow: ArrowSpec, route: syntax.Route) -> Iterator[Diagnostic]:
    """Yield what the block says that is of samples, and names that stand in `general` twice."""
    for item in route.items:
        name = item.name.text if isinstance(item, syntax.Attribute) else "when"
        name = "default" if isinstance(item, syntax.Otherwise) else name
        if name != "by":
            message = f"`{name}` is for samples, and `by = arrow(…)` routes tokens"
            there = ((arrow.span, "routes every token by itself"),)
            help = "leave one of the two out"
            yield Diagnostic("cannot-apply", message, item.span, secondary=there, help=help)
    for place, name in enumerate(arrow.general):
        if name in arrow.general[:place]:
            message = f"`{name}` stands in `general` twice"
            yield Diagnostic("duplicate-statement", message, arrow.span)


def _attribute(route: syntax.Route, name: str) -> Span:
    return next(
        item.span
        for item in route.items
        if isinstance(item, syntax.Attribute) and item.name.text == name
    )
