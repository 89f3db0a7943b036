"""Weights with adapters folded in, each beside the base's own.

A module keeps the merged tensors and the base's, and has in force the merged ones while adapters
take part. The base's are never written to: what `drop` puts back is the very tensor, bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights import copies
from lora_fx.graph.room import with_room
from lora_fx.plan.modules import outside_adapters

_NAME = "lora_merged"

Merged = Mapping[nn.Module, Mapping[str, Tensor]]


def source(module: nn.Module, name: str, adapters: Sequence[str]) -> Tensor:
    """Return the tensor that these adapters are merged into: one's own if it has one there."""
    for adapter in adapters:
        if copies.has(module, adapter) and name in copies.tensors(module, adapter):
            return copies.tensors(module, adapter)[name]
    found = copies.base_tensor(module, name)
    assert found is not None
    return found


def weight_for(site: Site, adapters: Sequence[str]) -> Tensor:
    """Return the weight of a site that these adapters are merged into."""
    return source(*site.lora_place, adapters)


def changed_by(site: Site, adapter: str) -> list[str]:
    """Return the names of the tensors of a site that an adapter is added to when it is merged.

    They are those in the module that the weight belongs to.
    """
    factors = site.lora_branches.get(adapter)
    if factors is None:
        return []
    name = site.lora_place[1]
    return [name, "bias"] if factors.has_bias else [name]


def keep(merged: Merged) -> None:
    """Let modules have these tensors in the place of their own, once they are put in force.

    A tensor that is given for several modules stays one.
    """
    parameters: dict[int, nn.Parameter] = {}
    for module, tensors in merged.items():
        copies.keep(module, tensors)
        own = {name: _parameter(module, tensor, parameters) for name, tensor in tensors.items()}
        setattr(module, _NAME, copies.Versions(own).train(module.training))


def _parameter(module: nn.Module, tensor: Tensor, made: dict[int, nn.Parameter]) -> nn.Parameter:
    if id(tensor) not in made:
        wide = isinstance(module, Site) and module.lora_room and tensor.dim() == 2
        values = with_room(tensor) if wide else tensor
        made[id(tensor)] = nn.Parameter(values, requires_grad=False)
    return made[id(tensor)]


def put_in_force(model: nn.Module) -> None:
    """Compute with what is merged, wherever there is something."""
    for _, module in holders(model):
        copies.put(module, tensors(module))


def drop(model: nn.Module) -> None:
    """Forget what is merged and put the base's tensors back."""
    for _, module in list(holders(model)):
        del module._modules[_NAME]
        copies.release(module)


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module that has merged tensors, with its fqn."""
    for fqn, module in outside_adapters(model):
        if _NAME in module._modules:
            yield fqn, module


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the merged tensors of a module by their names in it; none if it has none."""
    versions = module._modules.get(_NAME)
    return versions.tensors() if isinstance(versions, copies.Versions) else {}


def is_merged(fqn: str) -> bool:
    """Whether a module is one that holds merged tensors."""
    return _NAME in fqn.split(".")
