"""`layout = augmented`: room for B beside the weights of adapted linear layers.

    memory   [ W | room ]        the Parameter `weight` is the view W, (out, in)

Each weight moves to a storage of its own, so the given model keeps its own. What moves, casts or
copies a module packs the rows again; the site makes room anew. `graph/room.py` says what it is.
"""

from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn

from lora_fx.adapters import storage
from lora_fx.adapters.site import Site
from lora_fx.plan.offloaded import offload_hook


def augment(tree: nn.Module) -> None:
    """Make room beside the weight of every linear site that can have it, in place.

    Left as they are: weights that several modules share, quantised and offloaded ones, and other
    layouts than (out, in).
    """
    owners = Counter(_storage(weight) for weight in _parameters(tree))
    for _, site in storage.sites(tree):
        if _can_have_room(site) and owners[_storage(site.weight)] == 1:
            site.make_room()


def _parameters(tree: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of every module, those that modules share more than once."""
    for module in tree.modules():
        yield from (p for p in module._parameters.values() if p is not None)


def _can_have_room(site: Site) -> bool:
    return (
        isinstance(site, nn.Linear)
        and type(site.weight) is nn.Parameter
        and site.weight.is_floating_point()
        and offload_hook(site) is None
    )


def _storage(weight: Tensor) -> int:
    return weight.untyped_storage()._cdata
