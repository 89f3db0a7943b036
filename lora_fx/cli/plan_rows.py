"""What a plan holds, as rows in which equal layers are one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_fx.plan.folding import Fold, fold
from lora_fx.plan.kinds import Layer
from lora_fx.plan.plan import Plan
from lora_fx.plan.quantization import QuantizedModule
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.expressions import Word, show
from lora_fx.spec.spec import MergeSpec, Mix, RouteSpec

# Columns that are left out where they say this in every row; so is a scaling of alpha/rank.
_USUAL: Mapping[str, str] = {
    "kind": "linear",
    "variant": "lora",
    "dropout": "0",
    "init": "default",
    "lora_bias": "no",
    "tie": "no",
    "offload": "no",
    "seed": "0",
    "dtype": "float32",
    "compute": "activation",
    "trainable": "yes",
}


@dataclass(frozen=True)
class Row:
    """Parts of a plan that differ in nothing but the numbers in their names.

    `amount` are their parameters, of quantised modules their bytes.
    """

    name: Fold
    cells: Mapping[str, str]
    parts: tuple[Any, ...]

    @property
    def amount(self) -> int:
        """Of all parts together."""
        return sum(
            part.bytes if isinstance(part, QuantizedModule) else part.parameters
            for part in self.parts
        )


def adapter_rows(adapter: AdapterPlan) -> list[Row]:
    """Return the sites of an adapter and what it trains of the base, in that order."""
    return [
        *_rows(adapter.sites, lambda site: site.name, _site),
        *_rows(adapter.modules, lambda copy: copy.fqn, lambda copy: _of_base("train", copy)),
        *_rows(adapter.tokens, lambda rows: rows.fqn, lambda rows: _of_base(_ids(rows.ids), rows)),
        *_rows(adapter.biases, lambda bias: bias.name, lambda bias: _of_base("bias", bias)),
    ]


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns that say something, of all rows together."""
    names = dict.fromkeys(name for row in rows for name in row.cells)
    return [name for name in names if any(_says_something(name, row) for row in rows)]


def _says_something(name: str, row: Row) -> bool:
    if name not in row.cells:
        return False
    if name == "scaling":
        return any(site.scaling != site.alpha / site.rank for site in row.parts)
    return row.cells[name] != _USUAL.get(name)


def quantized_rows(plan: Plan) -> list[Row]:
    """Return the modules that are quantised."""
    modules = plan.quantized.values()
    return _rows(modules, lambda one: one.fqn, lambda one: {"method": _word(one.method)})


def _rows(
    parts: Iterable[Any],
    name_of: Callable[[Any], str],
    cells_of: Callable[[Any], Mapping[str, str]],
) -> list[Row]:
    """Fold parts whose cells are equal; what differs in its layers only stands together."""
    alike: dict[tuple[str, ...], dict[str, Any]] = {}
    cells: dict[tuple[str, ...], Mapping[str, str]] = {}
    for part in parts:
        shown = cells_of(part)
        key = tuple(shown.values())
        cells[key] = shown
        alike.setdefault(key, {})[name_of(part)] = part
    rows = [
        Row(name, cells[key], tuple(named[one] for one in name.names))
        for key, named in alike.items()
        for name in fold(named)
    ]
    order: dict[tuple[str, str], int] = {}
    place = {id(part): i for i, part in enumerate(parts)}
    for row in sorted(rows, key=lambda row: place[id(row.parts[0])]):
        order.setdefault((row.name.stack, row.name.rest), len(order))
    return sorted(rows, key=lambda row: (order[row.name.stack, row.name.rest], row.name.layers))


def _site(site: SitePlan) -> dict[str, str]:
    return {
        "kind": _kind(site.layer),
        "variant": _word(site.variant),
        "in": str(site.in_features),
        "out": str(site.out_features),
        "rank": str(site.rank),
        "alpha": f"{site.alpha:g}",
        "scaling": f"{site.scaling:g}",
        "dropout": f"{site.dropout:g}",
        "init": _word(site.init),
        "lora_bias": _yes(site.lora_bias),
        "tie": _yes(site.tie),
        "offload": _yes(site.offload),
        "seed": str(site.seed),
        "dtype": site.dtype,
        "compute": site.compute,
        "trainable": _yes(site.trainable),
    }


def _kind(layer: Layer) -> str:
    sizes = "×".join(map(str, layer.kernel))
    groups = f"/{layer.groups}" if layer.groups > 1 else ""
    experts = f"×{layer.experts}" if layer.experts > 1 else ""
    return f"{layer.kind} {sizes}{groups}{experts}".rstrip()


def _of_base(what: str, part: Any) -> dict[str, str]:
    return {"kind": what, "trainable": _yes(part.trainable)}


def _ids(ids: tuple[int, ...]) -> str:
    return f"token {ids[0]}" if len(ids) == 1 else f"{len(ids)} tokens"


def route_facts(route: RouteSpec) -> list[tuple[str, str]]:
    """Return what a route says, by name."""
    if route.arrow is not None:
        facts = [("by", "arrow, each token"), ("top", str(route.arrow.top))]
        facts += [("temperature", f"{route.arrow.temperature:g}")]
        return facts + [("general", ", ".join(route.arrow.general))] * bool(route.arrow.general)
    facts = [("by", f"argument `{route.argument}`")]
    facts += [("slots", str(route.slots))] if route.slots else []
    facts += [("max_rank", str(route.max_rank))] if route.max_rank else []
    facts += [("train", "all adapters")] if route.train else []
    facts += [(f'"{name}"', mix_text(mix)) for name, mix in route.mixes.items()]
    return facts + ([("default", mix_text(route.default))] if route.default else [])


def merge_text(merge: MergeSpec) -> str:
    """Return what becomes of which adapters."""
    parts = [mix_text(merge.mix), f"by {_word(merge.method)}"]
    parts += [f"to rank {merge.rank}"] if merge.rank else []
    parts += ["into the base"] if merge.into_base else []
    parts += ["dequantized"] if merge.dequantize else []
    parts += [f"in {merge.dtype}"] if merge.dtype else []
    parts += [f"saved in {merge.save}"] if merge.save else []
    return ", ".join(parts)


def mix_text(mix: Mix) -> str:
    """Return a mix as it is written, the base if it has no terms."""
    text = " + ".join(
        term.name if term.weight == 1 else f"{term.weight:g} * {term.name}" for term in mix.terms
    )
    return text.replace("+ -", "- ") or "base"


def _word(word: Word) -> str:
    """Return a word with its arguments, closely set."""
    return show(word).replace(" = ", "=")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
