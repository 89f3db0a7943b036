"""What a plan holds, as rows in which equal layers are one."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from lora_fx.plan.folding import fold as fold_names
from lora_fx.plan.plan import Plan
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.expressions import Word, show
from lora_fx.spec.spec import Mix

_One = TypeVar("_One")

# Columns that are left out where they say this at every site.
USUAL: Mapping[str, object] = {
    "kind": "linear",
    "dropout": "0",
    "variant": "lora",
    "bias": "no",
    "dtype": "float32",
    "compute": "activation",
    "trainable": "yes",
}


def fold(plan: Plan) -> list[tuple[str, list[SitePlan]]]:
    """Return rows of sites that differ in nothing but their layer, and a name for all of them.

    `model.layers.{0..7,12}.q_proj` are layers 0 to 7, both included, and 12.
    """
    return _folded(plan.sites, lambda site: site.name, lambda site: tuple(shown(site).values()))


def shown(site: SitePlan) -> dict[str, str]:
    """Return a site's columns, as text."""
    return {
        "adapter": site.adapter,
        "kind": site.layer.kind,
        "in": str(site.in_features),
        "out": str(site.out_features),
        "rank": str(site.rank),
        "alpha": f"{site.alpha:g}",
        "scaling": f"{site.scaling:g}",
        "dropout": f"{site.dropout:g}",
        "init": _word(site.init),
        "variant": _word(site.variant),
        "bias": _yes(site.lora_bias),
        "dtype": site.dtype,
        "compute": site.compute,
        "trainable": _yes(site.trainable),
    }


def trained_rows(plan: Plan) -> list[tuple[str, str, str, int]]:
    """Return rows of what is trained of the base: what, name, adapter, parameters."""
    parts: list[tuple[str, Iterable[Any], Callable[[Any], str]]] = [
        ("train", plan.trained, lambda one: one.fqn),
        ("bias", plan.biases, lambda one: one.name),
    ]
    rows = [
        (what, name, items[0].adapter, sum(item.parameters for item in items))
        for what, of, name_of in parts
        for name, items in _folded(of, name_of, lambda one: one.adapter)
    ]
    for tokens in plan.tokens:
        name = f"{len(tokens.ids)} rows of {tokens.fqn}"
        rows.append(("tokens", name, tokens.adapter, tokens.parameters))
    return rows


def quantized_rows(plan: Plan) -> list[tuple[str, str, int]]:
    """Return rows of quantised modules: name, method, bytes."""
    modules = plan.quantized.values()
    rows = _folded(modules, lambda one: one.fqn, lambda one: show(one.method))
    return [(name, _word(of[0].method), sum(one.bytes for one in of)) for name, of in rows]


def route_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return rows of the route: what, and its value."""
    route = plan.spec.route
    if route is None:
        return []
    rows = [("argument", route.argument)]
    rows += [("slots", str(route.slots))] if route.slots else []
    rows += [("max_rank", str(route.max_rank))] if route.max_rank else []
    rows += [("trained", "yes")] if route.train else []
    rows += [(f'when "{name}"', mix_text(mix)) for name, mix in route.mixes.items()]
    return rows + ([("default", mix_text(route.default))] if route.default else [])


def merge_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return rows of merges: name, and what becomes of which adapters."""
    rows = []
    for merge in plan.spec.merges:
        parts = [mix_text(merge.mix), f"by {_word(merge.method)}"]
        parts += [f"to rank {merge.rank}"] if merge.rank else []
        parts += ["into the base"] if merge.into_base else []
        parts += [f"saved in {merge.save}"] if merge.save else []
        rows.append((merge.name, ", ".join(parts)))
    return rows


def mix_text(mix: Mix) -> str:
    """Return a mix as it is written, the base if it has no terms."""
    text = " + ".join(f"{term.weight:g} * {term.name}" for term in mix.terms)
    return text.replace("+ -", "- ") or "base"


def _folded(
    items: Iterable[_One], name_of: Callable[[_One], str], like: Callable[[_One], object]
) -> list[tuple[str, list[_One]]]:
    """Fold the names of items that say the same; rows in the order of the first item of each."""
    groups: dict[object, dict[str, _One]] = {}
    place: dict[int, int] = {}
    for item in items:
        groups.setdefault(like(item), {})[name_of(item)] = item
        place[id(item)] = len(place)
    rows = [
        (str(row), [group[name] for name in row.names])
        for group in groups.values()
        for row in fold_names(group)
    ]
    return sorted(rows, key=lambda row: place[id(row[1][0])])


def _word(word: Word) -> str:
    return show(word).replace(" = ", "=")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
