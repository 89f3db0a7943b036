"""Whole adapters combined into the plan and the values of a new one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_fx.adapters import storage, token_rows
from lora_fx.adapters.bind import bind
from lora_fx.adapters.combine.factors import (
    Factors,
    clamp,
    combine,
    combine_biases,
)
from lora_fx.adapters.combine.gains import common_gain, with_gain
from lora_fx.adapters.combine.obstacles import (
    dora_and_biased,
    of_branches,
    replaced_and_adapted,
    vanishing,
)
from lora_fx.adapters.combine.part import Part, part_of
from lora_fx.adapters.combine.recipe import Recipe
from lora_fx.adapters.combine.trained import combined_copy, combined_rows
from lora_fx.adapters.init import generator_of
from lora_fx.adapters.sites.magnitudes import oriented_weight
from lora_fx.adapters.sites.parameter_site import ParameterSite, join
from lora_fx.adapters.weights import copies
from lora_fx.diagnostics import LoraFxError
from lora_fx.graph.exact import exact_products
from lora_fx.plan.alike import once_each
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.selectors import is_inside
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.expressions import Word

Mix = Sequence[tuple[AdapterPlan, float]]


@dataclass(frozen=True)
class Combined:
    """A new adapter, not yet in the model: its plan and its values, by place."""

    plan: AdapterPlan
    sites: Mapping[str, Mapping[str, Tensor]]
    copies: Mapping[tuple[str, str], Tensor]
    rows: Mapping[str, Tensor]

    @torch.no_grad()
    def bind(self, model: nn.Module) -> None:
        """Put the adapter in place; it is not activated."""
        bind(model, self.plan, lambda site, _: self.sites[site.name])
        for (fqn, name), values in self.copies.items():
            copies.tensors(model.get_submodule(fqn), self.plan.name)[name].copy_(values)
        for fqn, values in self.rows.items():
            (rows,) = token_rows.rows_of(model.get_submodule(fqn), self.plan.name)
            rows.weight.copy_(values)


@torch.no_grad()
@exact_products()
def combined(model: nn.Module, name: str, mix: Mix, recipe: Recipe) -> Combined:
    """Combine adapters of a model as they are now; the model is only looked at.

    Scalings are in the factors, so that the new adapter's is 1 everywhere. Raises LoraFxError
    naming everything that cannot be combined.
    """
    order = {name: place for place, (name, _) in enumerate(storage.sites(model))}
    there: dict[str, list[tuple[SitePlan, float]]] = {}
    for plan, weight in mix:
        for site in plan.sites:
            there.setdefault(site.name, []).append((site, weight))
    there = {fqn: there[fqn] for fqn in sorted(there, key=order.__getitem__)}
    weights = {plan.name: weight for plan, weight in mix}
    faults = [fault for found in there.values() for fault in of_branches(found, recipe)]
    faults += dora_and_biased(site for found in there.values() for site, _ in found)
    faults += replaced_and_adapted(model, there, weights)
    if faults:
        raise LoraFxError(once_each(faults))
    placed = dict(storage.sites(model))
    biased = any(site.lora_bias for found in there.values() for site, _ in found)
    parts = {
        fqn: [part_of(placed[fqn], site.adapter, weight) for site, weight in found]
        for fqn, found in there.items()
    }
    faults = [fault for fqn, here in parts.items() for fault in vanishing(fqn, here)]
    if faults:
        raise LoraFxError(once_each(faults))
    values = {
        fqn: _values(placed[fqn], found[0][0], parts[fqn], recipe, biased, generator)
        for fqn, found in there.items()
        for generator in (generator_of(recipe.seed, name, fqn),)
    }
    sites = tuple(site_of(name, found[0][0], values[fqn]) for fqn, found in there.items())
    plan = plan_of(name, sites, mix)
    return Combined(plan, values, *of_base(model, plan, weights))


def _values(
    site: storage.Site,
    planned: SitePlan,
    parts: Sequence[Part],
    recipe: Recipe,
    biased: bool,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    layer = planned.layer
    first, second = list(planned.tensors)[:2]
    A, B = _combined(site, parts, recipe, generator, layer.groups)
    c, bias, more = common_gain(parts), combine_biases(parts), {}
    if c is not None:
        W = oriented_weight(site).to(A.device)
        B, m = with_gain(W, A, B, c)
        more[storage.MAGNITUDE] = m.view(1, -1, *(1 for _ in layer.kernel)) if layer.kernel else m
    elif biased and site.lora_kind not in ("embedding", "parameter"):
        more["lora_B.bias"] = bias if bias is not None else B.new_zeros(B.shape[0])
    shapes = layer.shapes(A.shape[0] // layer.experts)
    values = {first: A.reshape(shapes[first]), second: B.reshape(shapes[second]), **more}
    return {key: tensor.to(recipe.dtype or tensor.dtype) for key, tensor in values.items()}


def _combined(
    site: storage.Site,
    parts: Sequence[Part],
    recipe: Recipe,
    generator: torch.Generator,
    groups: int,
) -> Factors:
    """Combine the branches of a site; each expert of a stack is a layer of its own."""
    if isinstance(site, ParameterSite) and site.weight.ndim > 2:
        each = [site.split(part.A, part.B) for part in parts]
        made = []
        for e in range(len(site.weight)):
            pairs = ((A[e], B[e]) for A, B in each)
            own = [replace(p, A=A, B=B) for p, (A, B) in zip(parts, pairs, strict=True)]
            made.append(_of_matrix(own, recipe, generator, groups))
        return join(torch.stack([A for A, _ in made]), torch.stack([B for _, B in made]))
    return _of_matrix(parts, recipe, generator, groups)


def _of_matrix(
    parts: Sequence[Part], recipe: Recipe, generator: torch.Generator, groups: int
) -> Factors:
    A, B = combine(recipe.method, parts, recipe.rank, generator, groups)
    return (A, B) if recipe.clamped is None else clamp((A, B), recipe.clamped)


def site_of(name: str, like: SitePlan, values: Mapping[str, Tensor]) -> SitePlan:
    """Return the plan of a new adapter's site with these tensors; its scaling is 1."""
    A, *_ = values.values()
    rank = A.shape[0] // like.layer.experts
    return replace(
        like,
        adapter=name,
        rank=rank,
        alpha=float(rank),
        scaling=1.0,
        rslora=False,
        dropout=0.0,
        init=Word("default"),
        variant=Word("dora" if storage.MAGNITUDE in values else "lora"),
        lora_bias="lora_B.bias" in values,
        dtype=str(A.dtype).removeprefix("torch."),
        compute="activation",
        trainable=False,
        tensors={key: tuple(tensor.shape) for key, tensor in values.items()},
        frozen=frozenset(),
        settings={},
    )


def plan_of(name: str, sites: tuple[SitePlan, ...], mix: Mix) -> AdapterPlan:
    """Return the plan of a new adapter with what those of a mix train of the base."""
    plans = [plan for plan, _ in mix]
    words = [plan.bias for plan in plans]
    modules = {m.fqn: m for plan in plans for m in plan.modules}
    tokens = {t.fqn: t for plan in plans for t in plan.tokens}
    ids = {
        fqn: tuple(
            sorted({i for plan in plans for t in plan.tokens if t.fqn == fqn for i in t.ids})
        )
        for fqn in tokens
    }
    plan = AdapterPlan(
        name,
        next((word for word in ("all", "lora_only") if word in words), "none"),
        sites,
        tuple(replace(m, adapter=name) for fqn, m in modules.items() if not _inside(fqn, modules)),
        tuple(replace(t, adapter=name, ids=ids[fqn]) for fqn, t in tokens.items()),
        tuple(
            replace(bias, adapter=name)
            for bias in {b.name: b for plan in plans for b in plan.biases}.values()
        ),
        (),
    )
    return plan.with_trainable(False)


def _inside(fqn: str, modules: Mapping[str, object]) -> bool:
    return is_inside(fqn, modules.keys() - {fqn})


def of_base(
    model: nn.Module, plan: AdapterPlan, weights: Mapping[str, float]
) -> tuple[dict[tuple[str, str], Tensor], dict[str, Tensor]]:
    """Return the values of copies and biases, by module and name, and of rows, by module."""
    own: dict[tuple[str, str], Tensor] = {}
    for trained in plan.modules:
        inside = storage.base_modules(model.get_submodule(trained.fqn), itself=True)
        for below, module in inside.items():
            fqn = f"{trained.fqn}.{below}".rstrip(".")
            for name in copies.own_names(module):
                own[fqn, name] = combined_copy(module, name, weights)
    for bias in plan.biases:
        fqn, _, name = bias.name.rpartition(".")
        own[fqn, name] = combined_copy(model.get_submodule(fqn), name, weights)
    rows = {
        tokens.fqn: combined_rows(model.get_submodule(tokens.fqn), tokens.ids, weights)  # type: ignore[arg-type]
        for tokens in plan.tokens
    }
    return own, rows
