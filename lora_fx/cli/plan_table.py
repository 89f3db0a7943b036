"""A plan as tables that align, for people."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from lora_fx.cli.plan_rows import (
    USUAL,
    fold,
    merge_rows,
    quantized_rows,
    route_rows,
    shown,
    trained_rows,
)
from lora_fx.plan.folding import ranges
from lora_fx.plan.plan import Plan

_PIPED_WIDTH = 1000
_NUMBERS = ("in", "out", "rank", "alpha", "scaling", "dropout", "parameters", "bytes")


def print_plan(plan: Plan, memory: Mapping[str, int], of: str | None) -> None:
    """Print all that a plan holds: what is adapted and trained, the totals, memory, layers.

    `memory` is `Plan.memory`'s; `of` says for which batch it holds, if activations are in it.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPED_WIDTH)
    for title, table in _tables(plan):
        console.print(f"\n{title}" if title else "", end="\n" if title else "")
        console.print(table)
    share = 100 * plan.trainable / plan.all if plan.all else 0.0
    print()
    print(
        f"trainable params: {plan.trainable:,d} || all params: {plan.all:,d} "
        f"|| trainable%: {share:.4f}"
    )
    print("memory:", ", ".join(f"{name} {_bytes(size)}" for name, size in memory.items()))
    print("        " + (f"of {of}" if of else "activations come on top: --batch N --sequence N"))
    for line in _layers(plan):
        print(line)


def _tables(plan: Plan) -> list[tuple[str, Table]]:
    """Return each part of the plan that there is, with its title."""
    found = [("", _sites(plan))] if plan.sites else []
    parts: list[tuple[str, Sequence[str], Sequence[Sequence[object]]]] = [
        ("trained of the base", ("by", "name", "adapter", "parameters"), trained_rows(plan)),
        ("quantised", ("module", "method", "bytes"), quantized_rows(plan)),
        ("route", ("", ""), route_rows(plan)),
        ("merges", ("", ""), merge_rows(plan)),
    ]
    return found + [(title, _table(columns, rows)) for title, columns, rows in parts if rows]


def _sites(plan: Plan) -> Table:
    """Columns that say the same as usual at every site are left out."""
    rows = [(name, shown(sites[0]), sites) for name, sites in fold(plan)]
    columns = [
        name
        for name in rows[0][1]
        if name not in USUAL or any(values[name] != USUAL[name] for _, values, _ in rows)
    ]
    return _table(
        ("module", *columns, "parameters"),
        [
            (name, *(values[c] for c in columns), sum(site.parameters for site in sites))
            for name, values, sites in rows
        ],
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(columns))
    for name in columns:
        numeric = name in _NUMBERS
        wraps = name in ("module", "name")
        table.add_column(
            name,
            justify="right" if numeric else "left",
            no_wrap=not wraps,
            overflow="fold" if wraps else "ellipsis",
        )
    for row in rows:
        texts = (f"{cell:,d}" if isinstance(cell, int) else str(cell) for cell in row)
        table.add_row(*texts)
    return table


def _layers(plan: Plan) -> list[str]:
    """Say which old layer each new one is: runs of new numbers, and of old ones."""
    if plan.layer_map is None:
        return []
    old = plan.layer_map.old
    runs: list[list[int]] = []
    for new, was in enumerate(old):
        if runs and was == old[new - 1] + 1:
            runs[-1].append(new)
        else:
            runs.append([new])
    mapped = (f"{ranges(run)} ← {ranges(old[i] for i in run)}" for run in runs)
    return [f"layers: {len(old)} in {plan.layer_map.stack}: {', '.join(mapped)}"]


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
