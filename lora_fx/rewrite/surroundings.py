"""What a node is computed in: what has been written before it, and in which modes.

Nodes with equal surroundings may change places, as far as none needs another's result.

Relies on `torch._C._set_grad_enabled`, which Dynamo writes for `torch.no_grad`; that
`tests/passes/test_join_picked.py` finds gradients behind it holds that.
"""

import operator
from collections.abc import Hashable

import torch
from torch.fx import Graph, Node

from lora_fx.graph.autocast import AUTOCAST_TARGETS

_ENTER, _EXIT = AUTOCAST_TARGETS
_IN_PLACE = frozenset(
    getattr(operator, name)
    for name in (
        *("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow"),
        *("irshift", "isub", "itruediv", "ixor", "setitem", "delitem"),
    )
)


def surroundings(graph: Graph) -> dict[Node, Hashable]:
    """Return those of each node: how much has been written, the grad mode, the open autocasts."""
    written, learns, autocasts = 0, None, ()
    found: dict[Node, Hashable] = {}
    for node in graph.nodes:
        found[node] = written, learns, autocasts
        if node.target is torch._C._set_grad_enabled:
            learns = node.args
        elif node.target is _ENTER:
            autocasts = *autocasts, node
        elif node.target is _EXIT:
            autocasts = tuple(one for one in autocasts if one not in node.args)
        elif node.op not in ("placeholder", "output") and (node.is_impure() or _writes(node)):
            written += 1
    return found


def _writes(node: Node) -> bool:
    """Whether a node writes into what it is given."""
    schema = getattr(node.target, "_schema", None)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (
        (schema is not None and schema.is_mutable)
        or (name.endswith("_") and not name.endswith("__"))
        or name == "triton_kernel_wrapper_mutation"
        or node.target in _IN_PLACE
        or node.kwargs.get("out") is not None
        or node.kwargs.get("inplace") is True
    )
