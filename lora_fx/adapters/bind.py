"""Put what a plan adds into a module tree."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_fx.adapters import storage, token_rows
from lora_fx.adapters.accelerator import start_device
from lora_fx.adapters.init import generator_of
from lora_fx.adapters.init.direction import start_direction
from lora_fx.adapters.reachable import require_reachable
from lora_fx.adapters.sites import encoder_layers, magnitudes
from lora_fx.adapters.sites.factors import Arithmetic, Compression
from lora_fx.adapters.sites.kasa import truncate
from lora_fx.adapters.sites.parameter_site import ParameterSite
from lora_fx.adapters.sites.sampler import last_draw
from lora_fx.adapters.weights import copies, merged, own_outputs
from lora_fx.adapters.weights.changed_weight import change, require_changeable, restore
from lora_fx.adapters.weights.mergeable import require_separate
from lora_fx.adapters.weights.offloaded_copies import keep_in_force
from lora_fx.adapters.weights.offloaded_parameters import show_parameters
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.offloaded import tied_names
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.trained import TrainedBias, TrainedModule, TrainedTokens
from lora_fx.plan.variants import blocks_of, compression_of, drawn_of
from lora_fx.spec.spec import ArrowSpec

Start = Callable[[SitePlan, nn.Module], Mapping[str, Tensor]]


def bind(model: nn.Module, plan: AdapterPlan, start: Start) -> None:
    """Put everything planned in place; nothing of it is active.

    `start` gives the tensors of a site, on its module, by PEFT's names, and as `weight` the base
    weight if the init changes it in a way of its own. What is trained of the base starts with the
    base's values. Raises LoraFxError, with nothing done, where a module would run without it, or
    where an init would change a weight that something else has changed.
    """
    require_reachable(model, (plan,))
    require_changeable(model, plan)
    _require_one_way(model, plan)
    for tokens in plan.tokens:
        _bind_tokens(model, tokens)
    for site_plan in plan.sites:
        module = model.get_submodule(site_plan.fqn)
        encoder_layers.mark_around(model, site_plan.fqn)
        _bind_site(module, site_plan, start(site_plan, module))
    for site_plan in plan.sites:
        if site_plan.tie:
            _tie_site(model, site_plan)
    for trained in plan.modules:
        _bind_copy(model, trained)
    for bias in plan.biases:
        _bind_bias(model, bias)


def _require_one_way(model: nn.Module, plan: AdapterPlan) -> None:
    """Raise LoraFxError if a module is adapted already, and now a parameter of it, or reversely."""
    for planned in plan.sites:
        sites = storage.sites_at(model.get_submodule(planned.fqn)).values()
        for site in sites:
            is_parameter = isinstance(site, ParameterSite)
            if site.lora_arithmetic and is_parameter is (planned.parameter is None):
                other = next(iter(site.lora_arithmetic))
                message = f"`{planned.fqn}` is adapted as a module and as a parameter"
                help = f"adapt it as `{other}` does, or delete that adapter"
                raise LoraFxError((Diagnostic("cannot-apply", message, help=help),))


def _bind_site(module: nn.Module, planned: SitePlan, start: Mapping[str, Tensor]) -> None:
    site = storage.mark(module, planned.parameter)
    if planned.parameter is not None:
        show_parameters(module)
    device, dtype = storage.base_device(site), getattr(torch, planned.dtype)
    computed_on = start_device(planned, device)
    tensors = {name: start[name].to(device, dtype) for name in planned.tensors if name in start}
    begins = storage.MAGNITUDE in planned.tensors.keys() - tensors.keys()
    if begins:
        shape = planned.tensors[storage.MAGNITUDE]
        tensors[storage.MAGNITUDE] = torch.empty(shape, device=device, dtype=dtype)
    if planned.variant.name == "velora":
        name = f"{planned.name}.{storage.DIRECTION}"
        v = start_direction(planned, generator_of(planned.seed, planned.adapter, name))
        tensors[storage.DIRECTION] = v.to(device)
    if planned.variant.name == "monteclora":
        tensors |= {
            k: t.to(device) for k, t in last_draw(planned.rank, drawn_of(planned)[0]).items()
        }
    how = arithmetic(planned), planned.trainable, planned.frozen
    storage.insert(site, planned.adapter, tensors, *how)
    if planned.variant.name == "kasa":
        truncate(site, planned.adapter, computed_on)
    elif planned.changes_base:
        change(site, planned.adapter, start.get("weight"), device=computed_on)
    if begins:
        magnitudes.begin(site, planned.adapter, computed_on)


def _tie_site(model: nn.Module, planned: SitePlan) -> None:
    embedding = storage.mark(model.get_submodule(planned.fqn))
    for module in sharing_weight(model, embedding):
        storage.insert_tied(storage.mark(module), planned.adapter, embedding, arithmetic(planned))


def sharing_weight(model: nn.Module, module: nn.Module) -> Iterator[nn.Module]:
    """Yield the other modules whose base weight is this module's: tied ones."""
    ties = tied_names(model)
    shared: dict[int | str, list[nn.Module]] = {}
    for fqn, other in storage.base_modules(model).items():
        weight = copies.base_tensor(other, "weight")
        if weight is not None:
            shared.setdefault(ties.get(f"{fqn}.weight", id(weight)), []).append(other)
    for group in shared.values():
        if any(other is module for other in group):
            yield from (other for other in group if other is not module)


def _bind_tokens(model: nn.Module, planned: TrainedTokens) -> None:
    embedding = model.get_submodule(planned.fqn)
    assert isinstance(embedding, nn.Embedding)
    rows = token_rows.add(embedding, planned.adapter, planned.ids, planned.trainable)
    for module in sharing_weight(model, embedding):
        token_rows.share(module, planned.adapter, rows)


def _bind_copy(model: nn.Module, planned: TrainedModule) -> None:
    for module in storage.base_modules(model.get_submodule(planned.fqn), itself=True).values():
        names = copies.own_names(module)
        if names:
            copies.add(module, planned.adapter, names, planned.trainable)
            _compute_own(model, module)
            if planned.tie and "weight" in names:
                for other in sharing_weight(model, module):
                    copies.share(other, planned.adapter, "weight", module)
                    _compute_own(model, other)


def _bind_bias(model: nn.Module, planned: TrainedBias) -> None:
    fqn, _, name = planned.name.rpartition(".")
    module = model.get_submodule(fqn)
    copies.add(module, planned.adapter, [name], planned.trainable)
    _compute_own(model, module)


def _compute_own(model: nn.Module, module: nn.Module) -> None:
    """Let a module that has versions compute with them, wherever it is and in a mixed batch."""
    keep_in_force(module)
    own_outputs.mark(module)
    fqn = next(fqn for fqn, one in model.named_modules() if one is module)
    encoder_layers.mark_around(model, fqn)


def arithmetic(planned: SitePlan) -> Arithmetic:
    """Return what the plan says about how a branch computes."""
    return Arithmetic(
        planned.alpha,
        planned.scaling,
        planned.rslora,
        planned.dropout,
        planned.compute,
        blocks_of(planned) if planned.variant.name == "bdlora" else (1, 1),
        Compression(*compression_of(planned)) if planned.variant.name == "velora" else None,
        drawn_of(planned) if planned.variant.name == "monteclora" else (0, 0.0),
        planned.variant.name == "alora",
    )


def require_compatible(
    model: nn.Module, adapters: tuple[str, ...], in_weights: tuple[str, ...] = ()
) -> None:
    """Raise LoraFxError if two of these adapters train the same part of the base.

    Those that are merged `in_weights` change the weights that they adapt, too.
    """
    every = tuple(dict.fromkeys((*in_weights, *adapters)))
    copies.require_one_each(model, every)
    token_rows.require_distinct(model, every)
    require_separate(model, adapters, in_weights)


def activate(
    model: nn.Module,
    adapters: tuple[str, ...],
    in_weights: tuple[str, ...] = (),
    arrow: ArrowSpec | None = None,
) -> None:
    """Let exactly these adapters take part in the forward, wherever they have something.

    With `arrow` each token is routed among them; without, they add up.

    Branches of those that are merged `in_weights` are not computed; whatever else they have is in
    force as that of the others is.
    """
    sites = [site for _, site in storage.sites(model)]
    for site in sites:
        site.lora_arrow = arrow
        site.activate(tuple(name for name in adapters if name not in in_weights), in_weights)
    every = tuple(dict.fromkeys((*in_weights, *adapters)))
    copies.activate(model, every)
    if in_weights:
        merged.put_in_force(model)
    token_rows.activate(model, every)
    for site in sites:
        site.keep_room()


def remove(model: nn.Module, adapter: str) -> None:
    """Delete everything of an adapter, which must not be active; weights it changed come back."""
    for _, site in storage.sites(model):
        if adapter in site.lora_arithmetic:
            if site.lora_change is not None and site.lora_change.adapter == adapter:
                restore(site)
            storage.remove(site, adapter)
    for _, module in copies.holders(model):
        if adapter in copies.adapters_of(module):
            copies.remove(module, adapter)
    for _, holder in token_rows.holders(model):
        if adapter in holder.lora_tokens:
            token_rows.remove(holder, adapter)
