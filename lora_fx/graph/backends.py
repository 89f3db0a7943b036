"""Run a rewritten graph: with TorchInductor or as it is.

Relies on `torch._inductor.compile` and `list_mode_options`, torch's documented way to hand Inductor
an FX graph, and on its option `post_grad_custom_pre_pass`, called with each direction's graph of
aten operators; `tests/graph/test_backends.py` holds what is used of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Graph, GraphModule

from lora_fx.graph.own_code import own_code

AtenPass = Callable[[Graph], int]


def inductor(
    module: GraphModule, inputs: Sequence[Any], mode: str, passes: tuple[AtenPass, ...] = ()
) -> Callable[..., Any]:
    """Compile with TorchInductor, forward and backward; `mode` as in `torch.compile`.

    `passes` rewrite the aten graph of each direction before Inductor's own.
    """
    import torch._inductor

    options = {} if mode == "default" else torch._inductor.list_mode_options(mode)
    options |= {"post_grad_custom_pre_pass": _aten_passes(passes)}
    return torch._inductor.compile(module, list(inputs), options=options)  # type: ignore[return-value]


def _aten_passes(passes: tuple[AtenPass, ...]) -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class AtenPasses(CustomGraphPass):
        """All passes in order; the caches of compiled code know them by this package's code."""

        def __call__(self, graph: Graph) -> None:
            for rewrite in passes:
                rewrite(graph)

        def uuid(self) -> Any:
            return own_code(), tuple(one.__name__ for one in passes)

    return AtenPasses()


def eager(module: GraphModule) -> Callable[..., Any]:
    """Run the graph's own Python code."""
    return module.forward
