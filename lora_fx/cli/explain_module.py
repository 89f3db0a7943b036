"""What `lora-fx explain SPEC MODULE` prints."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lora_fx.cli.columns import aligned
from lora_fx.cli.report import report
from lora_fx.diagnostics import Span
from lora_fx.plan import plan as plan_model
from lora_fx.plan.explain import Attribute, Part, Verdict
from lora_fx.plan.plan import Plan
from lora_fx.spec import parse


def explain_module(spec: Path, name: str, model: str | None) -> None:
    """Print, for each adapter, which line set which attribute of a module, and what lost."""
    with Console(stderr=True).status("Reading the model"):
        planned = plan_model(parse(spec), model)
        parts = planned.explain(name)
    report(planned.notes)
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text.assemble((name, "bold"), f"  {_what(planned, name)}"))
    for part in parts:
        _print_part(console, part)


def _what(planned: Plan, name: str) -> str:
    """Return a module's class, or a parameter's shape."""
    return planned.modules.get(name) or "×".join(map(str, planned.parameters[name]))


def _print_part(console: Console, part: Part) -> None:
    console.print(Text.assemble("\nadapter ", (part.adapter, "bold")))
    for line in _summary(part):
        console.print(f"  {line}")
    for site, attributes in part.sites:
        what = "" if site.parameter is None else f"{site.parameter}: "
        console.print(f"  {what}{site.layer.kind}, {site.in_features} → {site.out_features}")
        _print_table(console, _attribute_rows(attributes))
    _print_table(console, map(_verdict_row, part.verdicts))


def _print_table(console: Console, rows: Iterable[Sequence[Text]]) -> None:
    for line in aligned(list(rows), indent=4):
        console.print(line)


def _summary(part: Part) -> Iterator[str]:
    if part.does_nothing:
        yield "leaves it as it is"
    if part.trained is not None:
        yield f"trains a copy of {part.trained}"
    if part.tokens:
        yield f"trains its rows {', '.join(map(str, part.tokens))}"
    for bias in part.biases:
        yield f"trains {bias}"


def _attribute_rows(attributes: Iterable[Attribute]) -> Iterator[Sequence[Text]]:
    for attribute in attributes:
        setting = attribute.setting
        style = "dim" if setting is None else ""
        where = ("default", "") if setting is None else (_place(setting.span), setting.origin)
        yield [Text(text, style) for text in (attribute.name, attribute.value, *where)]
        for lost in attribute.lost:
            written = Text(lost.value.span.text, "strike")
            yield Text(), written, Text(_place(lost.span)), Text(f"{lost.origin}, overridden")


def _verdict_row(verdict: Verdict) -> Sequence[Text]:
    style = "" if verdict.selects else "dim"
    place = _place(verdict.selection.statement.span)
    return [Text(text, style) for text in (place, verdict.selection.text, _says(verdict))]


def _says(verdict: Verdict) -> str:
    if verdict.selects:
        return "selects it"
    if verdict.left_out is None:
        return "does not match it"
    written = " ".join(verdict.left_out.text.split())
    return f"matches it; `{written}` ({_place(verdict.left_out)}) leaves it out"


def _place(span: Span) -> str:
    return f"{span.source.name}:{span.line}"
