"""Find the values of a graph whose elements are known from their indices alone.

Every operator of `by_index` is pure. If a graph changes in place what one of these values may be
stored in, nothing of it is known.
"""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from lora_fx.graph.by_index import RULES, Operand, fit
from lora_fx.graph.inputs import body_of
from lora_fx.graph.lines import Unknown, Value

Known = dict[Node, Value]
_EXAMPLE = "example_value"


def indexed(module: GraphModule) -> Known:
    """Return the line or region that each known node is, in bodies of higher-order operators too.

    Holds for every value of the graph's inputs and of its symbolic sizes.
    """
    known: Known = {}
    return known if _fill(known, module) else {}


def _fill(known: Known, module: GraphModule) -> bool:
    """Add what a graph and its bodies have; return whether nothing is changed in place."""
    for node in module.graph.nodes:
        body, arguments = body_of(module, node)
        if body is not None:
            placeholders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
            pairs = zip(placeholders, arguments, strict=False)
            known.update({p: known[a] for p, a in pairs if a in known})
            if not _fill(known, body):
                return False
        elif any(_may_alias(target, known) for target in _changed(node)):
            return False
        else:
            try:
                known[node] = _value(node, known)
            except Unknown:
                continue
    return True


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


def _changed(node: Node) -> Iterator[Node]:
    """Yield what an operator changes in place, judged by its name and schema."""
    if not node.op.startswith("call"):
        return
    yield from _nodes(node.kwargs.get("out"))
    if node.target in RULES:
        return
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        yield from node.all_input_nodes
    elif in_place or node.kwargs.get("inplace") is True:
        yield from _nodes(node.args[:1])


_IN_PLACE = frozenset(
    ["setitem", "__setitem__"]
    + [f"i{name}" for name in ("add", "sub", "mul", "and", "or", "xor", "floordiv", "mod", "pow")]
)


def _nodes(arguments: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(arguments, found.append)
    return found


def _may_alias(node: Node, known: Known) -> bool:
    """Whether a tensor may share its storage with a known one: it is made of it, by no floats.

    Nothing of floating point is known, and a view has the dtype of what it views.
    """
    seen, ahead = set(), [node]
    while ahead:
        one = ahead.pop()
        example = one.meta.get(_EXAMPLE)
        if one in seen or not isinstance(example, Tensor) or example.is_floating_point():
            continue
        if one in known:
            return True
        seen.add(one)
        ahead += one.all_input_nodes
    return False
