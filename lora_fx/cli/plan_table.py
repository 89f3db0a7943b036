"""A plan as tables that align, for people."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from lora_fx.cli.columns import Row as Cells
from lora_fx.cli.columns import aligned
from lora_fx.cli.plan_rows import (
    Row,
    adapter_rows,
    columns,
    merge_text,
    quantized_rows,
    route_facts,
)
from lora_fx.plan.folding import ranges
from lora_fx.plan.plan import Plan
from lora_fx.plan.replication import LayerMap

_ANY_WIDTH = 1000
_NUMBERS = ("in", "out", "rank", "alpha", "scaling", "dropout", "seed", "parameters", "bytes")


def print_plan(plan: Plan, memory: Mapping[str, int], remark: str) -> None:
    """Print all that a plan holds: what is adapted and trained, the totals, memory, layers.

    On a terminal the modules of one stack stand below its name; elsewhere each row has the whole
    name of its modules. `memory` is `Plan.memory`'s, with activations or without; `remark` is
    about them.
    """
    console = Console(highlight=False, soft_wrap=True)
    for lines in _blocks(plan, memory, remark, console):
        if lines:
            console.print(Text("\n").join(lines), end="\n\n")
    share = 100 * plan.trainable / plan.all if plan.all else 0.0
    print(
        f"trainable params: {plan.trainable:,d} || all params: {plan.all:,d} "
        f"|| trainable%: {share:.4f}"
    )


def _blocks(
    plan: Plan, memory: Mapping[str, int], remark: str, console: Console
) -> Iterator[list[Text]]:
    width = console.width if console.is_terminal else None
    adapters = {adapter.name: adapter_rows(adapter) for adapter in plan.adapters}
    yield _table("adapter", adapters, "parameters", width)
    yield _table("quantized", {"": quantized_rows(plan)}, "bytes", width)
    if plan.layer_map is not None:
        yield _facts(f"layers of {plan.layer_map.stack}", list(_layers(plan.layer_map)))
    if plan.spec.route is not None:
        yield _facts("route", route_facts(plan.spec.route))
    for merge in plan.spec.merges:
        yield _facts(f"merge {merge.name}", [(merge_text(merge),)])
    yield _facts("memory", list(_memory(plan, memory, remark)), right=(1,))


def _facts(title: str, rows: Sequence[Cells], right: Sequence[int] = ()) -> list[Text]:
    return [Text(title, "bold"), *aligned(rows, right, indent=2)]


def _table(
    kind: str, sections: Mapping[str, Sequence[Row]], amount: str, width: int | None
) -> list[Text]:
    """Return the rows of all sections below one head; `amount` is the last column.

    With a width each section stands below its title, and modules below their stack.
    """
    rows = [row for some in sections.values() for row in some]
    if not rows:
        return []
    shown = columns(rows)
    names = (kind, "module") if width is None else ("", "layers")
    head = [Text(name, "bold") for name in (*names, *shown, amount)]
    lines: list[Cells | Text] = [head]
    for title, some in sections.items():
        if width is None:
            lines += [(title, str(row.name), *_cells(row, shown)) for row in some]
        else:
            lines += [Text(f"{kind} {title}".rstrip(), "bold"), *_below_stacks(some, shown)]
    right = [i for i, name in enumerate(head) if name.plain in _NUMBERS]
    return aligned(lines, right, width=width or _ANY_WIDTH)


def _below_stacks(rows: Iterable[Row], shown: Sequence[str]) -> Iterator[Cells | Text]:
    """Yield each stack's name and its rows; a name that the row before has too is not repeated."""
    for stack, group in groupby(rows, key=lambda row: row.name.stack):
        if stack:
            yield Text(f"  {stack}")
        before = ""
        for row in group:
            indent = "    " if stack else "  "
            name = "" if row.name.rest == before else f"{indent}{row.name.rest}"
            before = row.name.rest
            yield (name, ranges(row.name.layers, ", "), *_cells(row, shown))


def _cells(row: Row, shown: Sequence[str]) -> list[str]:
    return [*(row.cells.get(name, "") for name in shown), f"{row.amount:,d}"]


def _layers(layer_map: LayerMap) -> Iterator[tuple[str, str]]:
    """Say which old layer each new one is: runs of new numbers, and of old ones."""
    numbers = enumerate(layer_map.old)
    for _, run in groupby(numbers, key=lambda pair: pair[1] - pair[0]):
        new, old = zip(*run, strict=True)
        yield ranges(new), f"old {ranges(old)}"


def _memory(plan: Plan, memory: Mapping[str, int], remark: str) -> Iterator[tuple[str, str, str]]:
    optimizer = plan.spec.optimizer.name if plan.spec.optimizer else "adamw"
    remarks = {"optimizer": optimizer, "activations": remark}
    if plan.spec.compile.layout == "augmented":
        remarks["adapters"] = "and their layers' weights, held again: layout = augmented"
    for name, size in memory.items():
        if name == "total" and "activations" not in memory:
            yield "activations", "?", remark
        yield name, _bytes(size), remarks.get(name, "")
    if plan.merged_bytes:
        yield "merged", _bytes(plan.merged_bytes), "more, while adapters are merged into weights"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
