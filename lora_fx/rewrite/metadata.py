"""Build nodes with their metadata: example values by running on fakes, the rest inherited.

Relies on `torch._dispatch.python.enable_python_dispatcher`, which Dynamo too runs its fakes under:
without it composite operators reach C++ code that knows no symbolic sizes.
`test_example_values_of_symbolic_sizes` holds it.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph, Node
from torch.fx.node import map_arg

EXAMPLE = "example_value"
_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack")


def call(graph: Graph, target: Any, *args: Any, **options: Any) -> Node:
    """Add `target(*args, **options)` and note its example value, a fake with shape and dtype.

    `target` is an operator or torch function, or the name of a tensor method.
    """
    if isinstance(target, str):
        node = graph.call_method(target, args, options)
    else:
        node = graph.call_function(target, args, options)
    values = map_arg(args, lambda n: n.meta[EXAMPLE])
    named = map_arg(options, lambda n: n.meta[EXAMPLE])
    function = getattr(torch.Tensor, target) if isinstance(target, str) else target
    with fake_mode(values), enable_python_dispatcher(), _own_saved_tensors():
        node.meta[EXAMPLE] = function(*values, **named)
    return node


def dtype(node: Any) -> torch.dtype:
    """Return the dtype of a node's value."""
    return node.meta[EXAMPLE].dtype


def likely_size(size: Any) -> int:
    """Return a size, or of a symbolic one that which the graph was made at; nothing is guarded."""
    return size if isinstance(size, int) else int(size.node.hint or 1)


def inherit(node: Node, source: Node) -> None:
    """Give a new node the place in the model's source that the node it replaces had."""
    for key in _INHERITED:
        if key in source.meta:
            node.meta.setdefault(key, source.meta[key])


def fake_mode(values: Any) -> Any:
    """Return the fake mode that made the first of these values, or a null context."""
    modes = (getattr(tensor, "fake_mode", None) for tensor in _tensors(values))
    return next((mode for mode in modes if mode is not None), nullcontext())


def _own_saved_tensors() -> saved_tensors_hooks:
    """Keep what autograd saves here from the hooks of a checkpoint around the compiled call."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
