"""Let attention share key and value heads instead of repeating them.

    before   %r = reshape(expand(%k[:, :, None], (b, h, n, s, d)), (b, h·n, s, d))    so for %v
             %y = scaled_dot_product_attention(%q, %r, %t, attn_mask=None)
    after    %y = scaled_dot_product_attention(%q, %k, %v, attn_mask=None, enable_gqa=True)

`enable_gqa` repeats each head n times in a row, as `before` does, without writing or saving the
copies. Left alone: calls with a mask, and heads of more than 256, for which kernels fall back to
one that writes the scores; transformers draws the same line.
"""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lora_fx.passes.causal_attention import attention_calls, replace_arguments
from lora_fx.rewrite.driver import graph_modules
from lora_fx.rewrite.metadata import EXAMPLE

_ALL = slice(None, None, None)
_NEW_AXIS = (_ALL, _ALL, None, _ALL, _ALL)
_WIDEST = 256


def grouped_attention(module: GraphModule) -> int:
    """Take the repeated heads away; return of how many calls of attention."""
    changed = 0
    for part in graph_modules(module):
        changed += sum(_shared(*call) for call in attention_calls(part))
        part.graph.lint()
        part.recompile()
    return changed


def _shared(node: Node, arguments: dict[str, Any]) -> bool:
    key, value = (_repeated(arguments[name]) for name in ("key", "value"))
    if arguments.get("attn_mask") is not None or key is None or value is None:
        return False
    shapes = [one.meta[EXAMPLE].shape for one in (key, value)]
    width = shapes[0][-1]
    if shapes[0][1] != shapes[1][1] or width != shapes[1][-1] or width > _WIDEST:
        return False
    repeated = [arguments["key"], arguments["value"]]
    shared = {"key": key, "value": value, "enable_gqa": True}
    replace_arguments(node, arguments | shared, "grouped_attention")
    for one in repeated:
        _erase(one)
    return True


def _repeated(node: object) -> Node | None:
    """Return what a node repeats the heads of, or None."""
    expanded = _called(node, "reshape", torch.reshape)
    inserted = _called(expanded, "expand")
    heads = _called(inserted, operator.getitem)
    if heads is None or inserted.args[1] != _NEW_AXIS:  # type: ignore[union-attr]
        return None
    before, wide, after = (n.meta[EXAMPLE].shape for n in (heads, expanded, node))  # type: ignore[union-attr]
    b, h, s, d = before
    n = wide[2]
    if not all(isinstance(size, int) for size in (h, n, d)):
        return None
    same = zip((*wide, *after), (b, h, n, s, d, b, h * n, s, d), strict=True)
    return heads if all(statically_known_true(x == y) for x, y in same) else None


def _called(node: object, *targets: object) -> Node | None:
    """Return the first argument of a call of one of these targets."""
    if isinstance(node, Node) and node.op.startswith("call") and node.target in targets:
        first = node.args[0]
        return first if isinstance(first, Node) else None
    return None


def _erase(node: Node) -> None:
    """Erase the three nodes that repeat heads, unless something else reads them."""
    for _ in range(3):
        if node.users:
            return
        before = node.args[0]
        node.graph.erase_node(node)
        node = before  # type: ignore[assignment]
