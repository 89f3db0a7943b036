"""Keep what was drawn at random for the backward pass, whatever else is computed again there.

Below a memory budget torch's partitioner may choose to draw the numbers of a dropout anew in the
backward pass: others than in the forward, and gradients are wrong without a word. Operators that
draw are marked as to be kept; of dropout that is a seed, from which Inductor computes the rest.

Relies on what torch's partitioner reads in `meta["recompute"]` and on `CustomGraphPass`, Inductor's
way to see a graph of forward and backward before it is cut; `tests/runtime/test_memory_budget.py`
holds them.
"""

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy


class KeepRandom(CustomGraphPass):
    """Marks the operators of a joint graph that draw."""

    def __call__(self, graph: Graph) -> None:
        """Mark them."""
        for node in graph.nodes:
            if _draws(node):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> bytes:
        """Return what stands for this pass in the keys of Inductor's caches."""
        return get_hash_for_files((__file__,))


def _draws(node: Node) -> bool:
    """Whether an operator is random; attention is, if it has dropout."""
    if not isinstance(node.target, OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    never = "dropout_p" in names and given.get("dropout_p", 0.0) == 0.0
    return torch.Tag.nondeterministic_seeded in node.target.tags and not never
