"""Which base weights a spec quantises, and how many bytes they take then.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3: blocks of 64 weights with a float32 scale each;
double quantisation stores these in 8 bits, in blocks of 256 with a float32 scale each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_fx.diagnostics import Diagnostic, Span
from lora_fx.plan.alike import once_each
from lora_fx.plan.base_merges import modules_sharing
from lora_fx.plan.modules import Modules
from lora_fx.plan.offloaded import offload_hook
from lora_fx.plan.packed import packing_of
from lora_fx.plan.selectors import Selection
from lora_fx.spec.expressions import Word
from lora_fx.spec.spec import QuantizeSpec

_BLOCK, _SCALES = 64, 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Fault = tuple[str, str, str, str | None]  # code, message, label, help


@dataclass(frozen=True)
class QuantizedModule:
    """A linear layer whose weight is stored in 4 or 8 bits; `bytes` with its scales."""

    fqn: str
    method: Word
    storage: str
    bytes: int
    rule: Span


def quantized_modules(
    selections: Sequence[Selection], modules: Modules, diagnostics: list[Diagnostic]
) -> Mapping[str, QuantizedModule]:
    """Return the modules that are quantised, by fqn; the last statement that matches one counts.

    Those that are so already, as the statement says, stay.
    """
    chosen: dict[str, QuantizeSpec] = {}
    for selection in selections:
        assert isinstance(selection.statement, QuantizeSpec)
        chosen |= dict.fromkeys(selection.names, selection.statement)
    sharing = modules_sharing(modules)
    found: dict[str, QuantizedModule] = {}
    faults = []
    for fqn, statement in chosen.items():
        module = modules.by_fqn.get(fqn)
        fault = _fault(fqn, module, statement) or _shared(fqn, sharing, chosen)
        if fault is None:
            assert isinstance(module, nn.Linear)
            size = _bytes(module, statement.method)
            found[fqn] = QuantizedModule(
                fqn, statement.method, statement.storage, size, statement.span
            )
        else:
            code, message, label, help = fault
            span = statement.selector.span
            faults.append(Diagnostic(code, message, span, label, help=help))
    diagnostics += once_each(faults)
    return found


def _fault(fqn: str, module: nn.Module | None, statement: QuantizeSpec) -> _Fault | None:
    """Return what keeps a module from being quantised."""
    packing = None if module is None else packing_of(module)
    if module is not None and packing is not None:
        here, wanted = described(module), _described(statement)
        if here == wanted:
            return None
        message = "what is quantised already cannot be quantised otherwise"
        label = f"`{fqn}` is {here}, and this is {wanted}"
        return (
            "cannot-apply",
            message,
            label,
            "leave it out, or load the model without quantisation",
        )
    if type(module) is not nn.Linear:
        message = "only the weights of linear layers can be quantised"
        return "unsupported-layer", message, f"matches `{fqn}`", None
    if offload_hook(module) is not None:
        message = "a weight that is offloaded cannot be quantised"
        return "cannot-apply", message, f"that of `{fqn}`", "load the model without offloading"
    if module.weight.dtype not in _DTYPES:
        message = "only weights in float32, bfloat16 or float16 can be quantised"
        dtype = str(module.weight.dtype).removeprefix("torch.")
        return "cannot-apply", message, f"that of `{fqn}` is {dtype}", None
    return None


def _shared(
    fqn: str, sharing: Mapping[str, list[str]], chosen: Mapping[str, QuantizeSpec]
) -> _Fault | None:
    """Return a fault if other modules have the weight that are not quantised with it."""
    for other in sharing.get(fqn, []):
        if chosen.get(other) is not chosen[fqn]:
            message = "a weight that another module has, too, cannot be quantised in one alone"
            label = f"that of `{fqn}` is also `{other}`'s"
            return "cannot-apply", message, label, f"write `except {fqn.rpartition('.')[2]}`"
    return None


def described(module: nn.Module) -> str:
    """Return how a weight is packed, in the words of a statement."""
    packing, weight = packing_of(module), module._parameters["weight"]
    assert packing is not None
    assert weight is not None
    if packing.method == "int8":
        return f"int8(threshold = {module.state.threshold:g})"  # type: ignore[union-attr]
    storage = str(weight.dtype).removeprefix("torch.")
    return f"{packing.method}(double_quant = {_truth(packing.nested)}) in {storage}"


def _described(statement: QuantizeSpec) -> str:
    method = statement.method
    if method.name == "int8":
        return f"int8(threshold = {method.argument('threshold'):g})"
    nested = _truth(method.argument("double_quant"))
    return f"{method.name}(double_quant = {nested}) in {statement.storage}"


def _truth(value: object) -> str:
    return "true" if value else "false"


def _bytes(module: nn.Linear, method: Word) -> int:
    elements = module.in_features * module.out_features
    if method.name == "int8":
        return elements + 4 * module.out_features
    blocks = -(-elements // _BLOCK)
    scales = 4 * blocks
    if method.argument("double_quant"):
        scales = blocks + 4 * -(-blocks // _SCALES)
    return -(-elements // 2) + scales
