"""What adapters a model has, where, and which of them act, learn or are in the weights."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from lora_fx.adapters import storage, token_rows
from lora_fx.adapters.dynamic_class import base_of
from lora_fx.adapters.sites.parameter_site import ParameterSite, parameter_sites
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights import copies, merged
from lora_fx.plan.memory import count_elements, scales_of
from lora_fx.plan.offloaded import distinct_parameters

if TYPE_CHECKING:
    from lora_fx.runtime.methods.slots import SlotMethods

Trained = bool | Literal["irregular"]


@dataclass(frozen=True)
class LayerStatus:
    """One module of the base that adapters have something of, or a parameter that they adapt.

    `ranks` are of adapters that have a branch there, in a slot their own. `requires_grad` is
    `irregular` for an adapter of which some tensors there are trained and some are not. `bytes` are
    what adapters, and what is merged, take beside the base.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    available_adapters: list[str]
    requires_grad: dict[str, Trained]
    devices: dict[str, list[str]]
    ranks: dict[str, int]
    bytes: int


@dataclass(frozen=True)
class ModelStatus:
    """The whole model: adapters as they are given by name, sums over its layers.

    `base_bytes` are those of everything that is not an adapter's, `adapter_bytes` of adapters,
    `merged_bytes` of the weights that are held a second time while adapters are merged.
    `slots` are the names of the adapters in them, None for an empty one, whose bytes count too;
    `pinned_adapters` of these stay there, and `known_adapters` are in none, and brought in once
    they are named.
    """

    base_model_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    available_adapters: list[str]
    requires_grad: dict[str, Trained]
    devices: dict[str, list[str]]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    base_bytes: int
    adapter_bytes: int
    merged_bytes: int
    slots: list[str | None]
    pinned_adapters: list[str]
    known_adapters: list[str]


def layer_status(model: "SlotMethods") -> list[LayerStatus]:
    """Return the status of every module that adapters have something of, in module order."""
    return [
        _of_layer(model, name, module)
        for name, module in _places(model).items()
        if _adapters_at(model, name, module)
    ]


def model_status(model: "SlotMethods") -> ModelStatus:
    """Return the status of the model."""
    places, slots = _places(model), model.lora_fx_slots
    modules = list(places.values())
    own = {
        name: [tensor for module in modules for tensor in _tensors(module, name)]
        for name in model.lora_fx_adapters
    }
    parameters = list(distinct_parameters(model))
    held = _bytes(tensor for module in modules for tensor in merged.tensors(module).values())
    names = model._columns()
    adapters = _bytes(one for m in modules for name in names for one in _kept(m, name))
    return ModelStatus(
        base_of(type(model)).__name__,
        model.lora_fx_enabled,
        list(model.lora_fx_active),
        list(model.lora_fx_merged),
        list(model.lora_fx_adapters),
        {name: _trained(tensors) for name, tensors in own.items()},
        {name: _devices(tensors) for name, tensors in own.items()},
        sum(count_elements(p) for p in parameters if p.requires_grad),
        sum(count_elements(p) for p in parameters),
        sum(bool(_adapters_at(model, name, module)) for name, module in places.items()),
        _bytes(tensor for module in modules for tensor in _of_base(module)),
        adapters,
        held,
        [] if slots is None else list(slots.adapters),
        [] if slots is None else sorted(slots.pinned),
        [] if slots is None else slots.elsewhere(slots.folders),
    )


def _places(model: nn.Module) -> dict[str, nn.Module]:
    """Return every place where adapters may have something: a module, or a parameter's site."""
    places: dict[str, nn.Module] = {}
    for fqn, module in storage.base_modules(model, itself=True).items():
        places[fqn] = module
        places |= {f"{fqn}.{name}".strip("."): s for name, s in parameter_sites(module).items()}
    return places


def _of_layer(model: "SlotMethods", fqn: str, module: nn.Module) -> LayerStatus:
    there = _adapters_at(model, fqn, module)
    own = {name: list(_tensors(module, name)) for name in there}
    branches = module.lora_branches if isinstance(module, Site) else {}
    owner, only = (module, None)
    if isinstance(module, ParameterSite):
        owner, only = module.lora_place
    parameters = parameter_sites(owner) if only is None else {}
    held = [
        tensor
        for name, tensor in merged.tensors(owner).items()
        if name == only or (only is None and name not in parameters)
    ]
    return LayerStatus(
        fqn,
        base_of(type(owner)).__name__,
        model.lora_fx_enabled,
        [name for name in model.lora_fx_active if name in there],
        [name for name in model.lora_fx_merged if name in branches],
        there,
        {name: _trained(tensors) for name, tensors in own.items()},
        {name: _devices(tensors) for name, tensors in own.items()},
        {name: _rank(model, fqn, module, name) for name in there if name in branches},
        _bytes([*(tensor for name in there for tensor in _kept(module, name)), *held]),
    )


def _of_base(module: nn.Module) -> Iterator[Tensor]:
    """Yield the base's tensors of a module, whatever is in force."""
    for name in (*module._parameters, *module._buffers):
        tensor = copies.base_tensor(module, name)
        if tensor is not None and not name.startswith("lora_"):
            yield tensor
            yield from scales_of(tensor)


def _adapters_at(model: "SlotMethods", fqn: str, module: nn.Module) -> list[str]:
    there = [name for name in model.lora_fx_adapters if any(True for _ in _tensors(module, name))]
    return [name for name in there if not _in_slot(model, name) or fqn in _slot_ranks(model, name)]


def _rank(model: "SlotMethods", fqn: str, module: nn.Module, adapter: str) -> int:
    if _in_slot(model, adapter):
        return _slot_ranks(model, adapter)[fqn]
    return module.lora_rank(adapter)  # type: ignore[operator]


def _in_slot(model: "SlotMethods", adapter: str) -> bool:
    return model.lora_fx_slots is not None and adapter in model.lora_fx_slots.adapters


def _slot_ranks(model: "SlotMethods", adapter: str) -> dict[str, int]:
    return {site.name: site.rank for site in model.lora_fx_adapters[adapter].sites}


def _tensors(module: nn.Module, adapter: str) -> Iterator[Tensor]:
    """Yield what an adapter has of a module; a tied one has what the other has."""
    if isinstance(module, Site) and adapter in module.lora_branches:
        factors = module.lora_branches[adapter]
        yield from (factors.A.weight, factors.B.weight)
        if factors.B.bias is not None:
            yield factors.B.bias
        if factors.magnitude is not None:
            yield factors.magnitude.weight
        if factors.diagonal is not None:
            yield factors.diagonal.weight
        if factors.sampler is not None:
            yield from factors.sampler.parameters()
    if copies.has(module, adapter):
        yield from copies.tensors(module, adapter).values()
    for rows in token_rows.rows_of(module, adapter):
        yield rows.weight


def _kept(module: nn.Module, adapter: str) -> Iterator[Tensor]:
    """Yield all that is held of a module for an adapter: what it started as and follows, too."""
    yield from _tensors(module, adapter)
    if isinstance(module, Site) and adapter in module.lora_branches:
        direction, change = module.lora_branches[adapter].direction, module.lora_change
        if direction is not None:
            yield direction.weight
        sampler = module.lora_branches[adapter].sampler
        if sampler is not None:
            yield from sampler.buffers()
        if change is not None and change.adapter == adapter:
            yield from (change.factors.A.weight, change.factors.B.weight)


def _trained(tensors: list[Tensor]) -> Trained:
    found = {tensor.requires_grad for tensor in tensors if tensor.is_floating_point()}
    return "irregular" if len(found) > 1 else True in found


def _devices(tensors: list[Tensor]) -> list[str]:
    return sorted({str(tensor.device) for tensor in tensors})


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(one): one for one in tensors}.values())
