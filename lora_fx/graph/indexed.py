"""Find the values of a graph whose elements are known from their indices alone.

What a graph may change in place is not known, nor what is read off it.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from lora_fx.graph.by_index import RULES, VIEWS, Operand, fit
from lora_fx.graph.inputs import body_of
from lora_fx.graph.lines import Unknown, Value

Known = dict[Node, Value]
_EXAMPLE = "example_value"
_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def indexed(module: GraphModule) -> Known:
    """Return the line or region that each known node is, in checkpointed bodies too.

    Holds for every value of the graph's inputs and of its symbolic sizes.
    """
    nodes = list(_in_order(module))
    given = {inner: outer for _, operands in nodes for inner, outer in operands}
    changed = _changed_in_place([node for node, _ in nodes], given)
    known: Known = {}
    for node, _ in nodes:
        if node in changed:
            continue
        if given.get(node) in known:
            known[node] = known[given[node]]
        else:
            try:
                known[node] = _value(node, known)
            except Unknown:
                continue
    return known


def _in_order(module: GraphModule) -> Iterator[tuple[Node, list[tuple[Node, Node]]]]:
    """Yield every node, and what the placeholders of its body are given, before those of a body."""
    for node in module.graph.nodes:
        body, arguments = body_of(module, node)
        if body is None or node.target is not _CHECKPOINT or len(node.args[0].users) > 1:
            yield node, []
            continue
        placeholders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        pairs = zip(placeholders, arguments, strict=False)
        yield node, [(inner, outer) for inner, outer in pairs if isinstance(outer, Node)]
        yield from _in_order(body)


def _value(node: Node, known: Known) -> Value:
    rule, example = RULES.get(node.target), node.meta.get(_EXAMPLE)
    if not node.op.startswith("call") or rule is None or not isinstance(example, Tensor):
        raise Unknown

    def operand(argument: Node) -> Any:
        value = argument.meta.get(_EXAMPLE)
        return Operand(known.get(argument), value) if isinstance(value, Tensor) else value

    args, kwargs = map_arg((node.args, node.kwargs), operand)  # type: ignore[misc]
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError as error:
        raise Unknown from error
    return fit(rule(*args, **kwargs), example)


def _changed_in_place(nodes: list[Node], given: dict[Node, Node]) -> set[Node]:
    """Return the nodes that may share their storage with something that is written to.

    Floating point is left out: nothing of it is known, and a view has the dtype of what it views.
    """
    found: set[Node] = set()
    ahead = [target for node in nodes for target in _written(node)]
    while ahead:
        node = ahead.pop()
        example = node.meta.get(_EXAMPLE)
        if node in found or not isinstance(example, Tensor) or example.is_floating_point():
            continue
        found.add(node)
        if node in given:
            ahead.append(given[node])
        elif node.target not in RULES or node.target in VIEWS:
            ahead += node.all_input_nodes
    return found


def _written(node: Node) -> list[Node]:
    """Return what an operator writes to, judged by its name and schema."""
    out = _nodes(node.kwargs.get("out"))
    if not node.op.startswith("call") or node.target in RULES:
        return out
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name.strip("_") in _IN_PLACE
    schema = getattr(node.target, "_schema", None)
    other_body = isinstance(node.target, HigherOrderOperator) and node.target is not _CHECKPOINT
    if other_body or (schema is not None and schema.is_mutable):
        return node.all_input_nodes
    if in_place or node.kwargs.get("inplace") is True:
        return [*out, *_nodes(node.args[:1])]
    return out


_IN_PLACE = frozenset(
    ["setitem"]
    + [f"i{name}" for name in ("add", "sub", "mul", "and", "or", "xor", "floordiv", "mod", "pow")]
)


def _nodes(arguments: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(arguments, found.append)
    return found
