"""A plan as a table in which equal layers are one row."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from lora_fx.plan.plan import Plan
from lora_fx.plan.sites import SitePlan

_PIPED_WIDTH = 1000
_USUAL = {"dtype": "float32", "compute": "activation", "trainable": True}


def print_plan(plan: Plan) -> None:
    """Print the table, the totals, the memory, and which layer is which after replication."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPED_WIDTH)
    console.print(_table(plan))
    share = 100 * plan.trainable / plan.all if plan.all else 0.0
    print()
    print(
        f"trainable params: {plan.trainable:,d} || all params: {plan.all:,d} "
        f"|| trainable%: {share:.4f}"
    )
    print("memory:", ", ".join(f"{name} {_bytes(size)}" for name, size in plan.memory().items()))
    if plan.layer_map is not None:
        ranges = ", ".join(f"{start}..{end}" for start, end in plan.layer_map.ranges)
        print(f"layers: {len(plan.layer_map.old)} in {plan.layer_map.stack}, from {ranges}")


def fold(plan: Plan) -> list[tuple[str, list[SitePlan]]]:
    """Return rows of sites that differ in nothing but their layer, and a name for all of them.

    `model.layers.{0..7,12}.q_proj` are layers 0 to 7, both included, and 12.
    """
    rows: dict[tuple, list[tuple[int | None, SitePlan]]] = {}
    for site in plan.sites:
        before, index, after = _split(site.fqn, plan.stacks)
        rows.setdefault((before, after, *_shown(site).values()), []).append((index, site))
    folded = []
    for (before, after, *_), members in rows.items():
        layers = [index for index, _ in members if index is not None]
        folded.append((f"{before}{_ranges(layers)}{after}", [site for _, site in members]))
    return folded


def _split(fqn: str, stacks: Iterable[str]) -> tuple[str, int | None, str]:
    inside = [f"{stack}." for stack in stacks if fqn.startswith(f"{stack}.")]
    if not inside:
        return fqn, None, ""
    before = max(inside, key=len)
    index, dot, after = fqn[len(before) :].partition(".")
    return before, int(index), dot + after


def _ranges(layers: Sequence[int]) -> str:
    if len(layers) < 2:
        return "".join(map(str, layers))
    runs = []
    for _, run in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0]):
        numbers = [layer for _, layer in run]
        runs.append(f"{numbers[0]}..{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}")
    return "{" + ",".join(runs) + "}"


def _shown(site: SitePlan) -> Mapping[str, object]:
    return {
        "adapter": site.adapter,
        "in": site.in_features,
        "out": site.out_features,
        "rank": site.rank,
        "alpha": f"{site.alpha:g}",
        "scaling": f"{site.scaling:g}",
        "dropout": f"{site.dropout:g}",
        "init": site.init,
        "dtype": site.dtype,
        "compute": site.compute,
        "trainable": site.trainable,
    }


def _table(plan: Plan) -> Table:
    """Columns that say the same as always at every site are left out."""
    hidden = {
        name for name, usual in _USUAL.items() if all(getattr(s, name) == usual for s in plan.sites)
    }
    rows = fold(plan)
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = [name for name in (_shown(rows[0][1][0]) if rows else {}) if name not in hidden]
    table.add_column("module", overflow="fold")
    for name in columns:
        numeric = name in ("in", "out", "rank", "alpha", "scaling", "dropout")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for name, sites in rows:
        shown = _shown(sites[0])
        total = sum(site.parameters for site in sites)
        table.add_row(name, *(_text(shown[column]) for column in columns), f"{total:,d}")
    return table


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
