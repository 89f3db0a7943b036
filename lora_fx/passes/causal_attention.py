"""Let attention know that its mask is the causal one, or hides nothing.

    before   %m = ... le(%keys, %queries) ...               (…, L, S), true where seen
             %y = scaled_dot_product_attention(%q, %k, %v, attn_mask=%m, is_causal=False)
    after    %y = scaled_dot_product_attention(%q, %k, %v, attn_mask=None, is_causal=True)

The kernels that never write the (L, S) scores take no mask; `is_causal` they take. The value of
%m is proved from the graph (`graph/indexed.py`): key ≤ query and nothing else, for L = S, gives
`is_causal=True`; true everywhere gives no mask. Masks of which more depends on inputs, padded,
packed or custom ones, and windows that are shorter than the sequence, are left alone.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lora_fx.graph.indexed import Known, indexed
from lora_fx.graph.lines import Line, Region
from lora_fx.rewrite.driver import graph_modules
from lora_fx.rewrite.metadata import EXAMPLE

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def causal_attention(module: GraphModule) -> int:
    """Take the masks away that attention does not need; return how many."""
    known = indexed(module)
    changed = 0
    for part in graph_modules(module):
        changed += sum(_without_mask(*call, known) for call in attention_calls(part))
        _erase_unused(part, known)
        part.graph.lint()
        part.recompile()
    return changed


def attention_calls(part: GraphModule) -> list[tuple[Node, dict[str, Any]]]:
    """Return the calls of attention in one graph, with their arguments by name."""
    calls = part.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    return [(n, {**dict(zip(_NAMES, n.args, strict=False)), **n.kwargs}) for n in calls]


def replace_arguments(node: Node, arguments: dict[str, Any], rule: str) -> None:
    """Give a call of attention other arguments, and note the rule that did."""
    node.args = tuple(arguments.pop(name) for name in _NAMES[:3])
    node.kwargs = arguments
    known = node.meta.get("lora_fx", {})
    steps = [known["rule"], rule] if "rule" in known else [rule]
    node.meta["lora_fx"] = {**known, "rule": "/".join(steps)}


def _without_mask(node: Node, arguments: dict[str, Any], known: Known) -> bool:
    mask = arguments.get("attn_mask")
    region = known.get(mask) if isinstance(mask, Node) else None
    if not isinstance(region, Region) or not isinstance(mask, Node):
        return False
    shape = mask.meta[EXAMPLE].shape
    causal = [line for line in region.lines if _is_causal(line, shape)]
    if len(causal) < len(region.lines):
        return False
    changed = {"attn_mask": None, "is_causal": bool(causal)}
    replace_arguments(node, arguments | changed, "causal_attention")
    return True


def _is_causal(line: Line, shape: Sequence[Any]) -> bool:
    """Whether a line is query - key over as many queries as keys."""
    *outer, queries, keys = line.steps
    square = statically_known_true(shape[-2] == shape[-1])
    plain = (queries, keys) == (1, -1) and not any(outer)
    return square and plain and statically_known_true(line.start == 0)


def _erase_unused(part: GraphModule, known: Known) -> None:
    """Erase what only made the masks."""
    for node in reversed(list(part.graph.nodes)):
        if node in known and node.op != "placeholder" and not node.users:
            part.graph.erase_node(node)
