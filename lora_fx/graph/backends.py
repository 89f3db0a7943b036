"""Run a rewritten graph: with TorchInductor or as it is.

Relies on `torch._inductor.compile` and `list_mode_options`, torch's documented way to hand Inductor
an FX graph, on its option `post_grad_custom_pre_pass`, called with each direction's graph of aten
operators, and on the setting `activation_memory_budget` of its partitioner, which has no public
name before torch 2.13; `tests/graph/test_backends.py` holds what is used of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Graph, GraphModule

AtenPass = Callable[[Graph], int]

_LEAST = 1e-6  # of nothing at all, torch's partitioner keeps no seeds of dropout either


def inductor(
    module: GraphModule,
    inputs: Sequence[Any],
    mode: str,
    passes: tuple[AtenPass, ...] = (),
    budget: float = 1.0,
) -> Callable[..., Any]:
    """Compile with TorchInductor, forward and backward; `mode` as in `torch.compile`.

    `passes` rewrite the aten graph of each direction before Inductor's own. `budget` is the share
    that is kept, for the backward pass, of what would be kept without it, the graph's inputs aside;
    the rest is computed again there, the cheapest to compute first.
    """
    import torch._functorch.config
    import torch._inductor

    from lora_fx.graph.aten_passes import AtenPasses

    options = {} if mode == "default" else torch._inductor.list_mode_options(mode)
    options = {**options, "post_grad_custom_pre_pass": AtenPasses(passes)}
    if budget == 1:
        return torch._inductor.compile(module, list(inputs), options=options)  # type: ignore[return-value]
    from lora_fx.graph.keep_random import KeepRandom

    options = {**options, "joint_custom_post_pass": KeepRandom()}
    with torch._functorch.config.patch(activation_memory_budget=max(budget, _LEAST)):
        return torch._inductor.compile(module, list(inputs), options=options)  # type: ignore[return-value]


def eager(module: GraphModule) -> Callable[..., Any]:
    """Run the graph's own Python code."""
    return module.forward
