"""Which weights get room beside them, under `layout = augmented`."""

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_fx.plan.offloaded import offload_hook


def weights_with_room(tree: nn.Module, sites: Iterable[str]) -> dict[str, Tensor]:
    """Return by fqn the weights of these modules that can have it.

    Not those that several modules share, quantised and offloaded ones, other layouts than
    (out, in), and those that `nn.MultiheadAttention` gives to a kernel of its own.
    """
    owners = Counter(map(_storage, _parameters(tree)))
    weights = {fqn: tree.get_submodule(fqn).weight for fqn in sites if _can_have_room(tree, fqn)}
    return {fqn: w for fqn, w in weights.items() if owners[_storage(w)] == 1}  # type: ignore[arg-type, misc]


def _parameters(tree: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of every module, those that modules share more than once."""
    for module in tree.modules():
        yield from (p for p in module._parameters.values() if p is not None)


def _can_have_room(tree: nn.Module, fqn: str) -> bool:
    module = tree.get_submodule(fqn)
    return (
        isinstance(module, nn.Linear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and type(module.weight) is nn.Parameter
        and module.weight.is_floating_point()
        and offload_hook(module) is None
    )


def _storage(weight: Tensor) -> int:
    return weight.untyped_storage()._cdata
