"""What must hold of a graph at each stage; checked after every rule and pass."""

from typing import Literal, get_args

from torch.fx import GraphModule, Node

from lora_fx.graph.autocast import AUTOCAST_TARGETS
from lora_fx.graph.text import text

Stage = Literal["captured", "adapted", "fused", "lowered"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_OWN = ("replace_rows", "replace_columns", "mix", "shift", "mix_rows", "mix_columns")
_KEPT = frozenset(f"lora_fx::{name}" for name in _OWN)
_SHRINKS = ("shrink", "compressed_shrink", "convolve", "lookup")
_NAMES = (
    *(*_SHRINKS, "expand", "magnitude", "share", "invoked", "arrow"),
    *("block_diagonal", "diagonal", "perturb"),
    *("stack_shrink", "stack_expand"),
    *("choose", "sample_scalings", "sample_shrink", "sample_expand"),
    *("take", "spread", "masked_expand"),
)
_GROUPED = frozenset({"lora_fx::grouped"})
_PICKED = frozenset({"lora_fx::pick", "lora_fx::picked_shrink", "lora_fx::picked_expand"})
_PACKED = {"lora_fx::packed_linear", "lora_fx::packed_rows"}
_KERNELS = {"lora_fx::row_squares", "lora_fx::dropped_shrink"}
_NORMS = {"lora_fx::norms", "lora_fx::packed_norms"}
_BRANCHES = frozenset(f"lora_fx::{name}" for name in _NAMES)
_LEGAL: dict[Stage, frozenset[str]] = {
    "captured": _GROUPED | _KEPT | {"lora_fx::site", "lora_fx::merge"},
    "adapted": _GROUPED | _PICKED | _KEPT | _BRANCHES | _PACKED | _NORMS | {"lora_fx::delta"},
    "fused": _GROUPED | _PICKED | _KEPT | _BRANCHES | _PACKED | _KERNELS | {"lora_fx::delta"},
    "lowered": _GROUPED | _PICKED | _PACKED | _KERNELS | {"lora_fx::gain"},
}


class InvalidGraph(Exception):
    """A rule or pass left a graph that its stage does not allow: a bug in lora_fx.

    The message names the stage, the step that ran last and every fault, and prints the graph.
    """

    def __init__(self, stage: Stage, step: str, faults: list[str], module: GraphModule) -> None:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        super().__init__(
            f"this is a bug in lora_fx: after `{step}` the graph is not `{stage}`\n{listed}\n"
            f"{text(module)}"
        )


def verify(module: GraphModule, stage: Stage, step: str) -> None:
    """Check legal operators, metadata, use lists and order; raises InvalidGraph."""
    faults = [
        fault
        for part in module.modules()
        if isinstance(part, GraphModule)
        for node in part.graph.nodes
        for fault in _faults(node, stage)
    ]
    if faults:
        raise InvalidGraph(stage, step, faults, module)
    module.graph.lint()


def _faults(node: Node, stage: Stage) -> list[str]:
    faults = []
    name = getattr(node.target, "_schema", None)
    operator = name.name if name is not None else ""
    if operator.startswith("lora_fx::") and operator not in _LEGAL[stage]:
        faults.append(f"%{node.name}: `{operator}` is not legal here")
    if "lora_fx" in node.meta and node.target not in AUTOCAST_TARGETS:
        if "rule" in node.meta["lora_fx"] and "example_value" not in node.meta:
            faults.append(f"%{node.name}: a new node without an example value")
        if not node.users:
            faults.append(f"%{node.name}: made and never used")
    return faults
