"""`layout = augmented`: room for B beside the weights of adapted linear layers.

    memory   [ W | room ]        the Parameter `weight` is the view W, (out, in)

Each weight moves to a storage of its own, so the given model keeps its own. What moves, casts or
copies a module packs the rows again; the site makes room anew. `graph/room.py` says what it is.
"""

from torch import nn

from lora_fx.adapters import storage
from lora_fx.graph.room import has_room
from lora_fx.plan.room import weights_with_room


def augment(tree: nn.Module) -> None:
    """Make room beside the weight of every linear site that can have it, in place.

    A weight that is a view with the same strides is packed: what is beside it is not room.
    """
    for parameter in tree.parameters():
        if has_room(parameter):
            parameter.data = parameter.detach().contiguous()
    sites = {fqn: site for fqn, site in storage.sites(tree) if site.lora_place[0] is site}
    for fqn in weights_with_room(tree, sites):
        sites[fqn].make_room()
