"""Run a rewritten graph: with TorchInductor or as it is.

Relies on `torch._inductor.compile` and `list_mode_options`, torch's documented way to hand Inductor
an FX graph; `tests/graph/test_backends.py` holds what is used of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule


def inductor(module: GraphModule, inputs: Sequence[Any], mode: str) -> Callable[..., Any]:
    """Compile with TorchInductor, forward and backward; `mode` as in `torch.compile`."""
    import torch._inductor

    options = {} if mode == "default" else torch._inductor.list_mode_options(mode)
    return torch._inductor.compile(module, list(inputs), options=options)  # type: ignore[return-value]


def eager(module: GraphModule) -> Callable[..., Any]:
    """Run the graph's own Python code."""
    return module.forward
