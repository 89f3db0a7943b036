"""What a spec quantises, quantised: after its inits and merges have seen the whole weights."""

from torch import nn

from lora_fx.adapters.weights.dequantise import as_if_packed
from lora_fx.adapters.weights.quantise import quantise
from lora_fx.compiler.bind import Given
from lora_fx.plan.plan import Plan
from lora_fx.runtime.progress import Report
from lora_fx.runtime.quantization_config import announce_packed


def quantise_merged(tree: nn.Module, plan: Plan) -> None:
    """Let merges find the values of what would be packed if they did not go there."""
    as_if_packed(tree, plan.dequantized)


def quantise_tree(tree: nn.Module, plan: Plan, given: Given, report: Report) -> None:
    """Pack what the plan says, in place; a Hugging Face model then says that it is quantised.

    DoRA's magnitudes that are not `given` start on what is packed.
    """
    started = [adapter for adapter in plan.adapters if adapter.name not in given]
    quantise(tree, plan.quantized, started, report)
    methods = {(module.method, module.storage) for module in plan.quantized.values()}
    if len(methods) == 1:
        announce_packed(tree, next(iter(plan.quantized.values())))
