"""Which base weights a spec quantises, and how many bytes they take then.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3: blocks of 64 weights with a float32 scale each;
double quantisation stores these in 8 bits, in blocks of 256 with a float32 scale each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lora_fx.diagnostics import Diagnostic, Span
from lora_fx.plan.alike import once_each
from lora_fx.plan.modules import Modules
from lora_fx.plan.selectors import Selection
from lora_fx.spec.expressions import Word
from lora_fx.spec.spec import QuantizeSpec

_BLOCK, _SCALES = 64, 256


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
    """Return the modules that are quantised, by fqn; the last statement that matches one counts."""
    found: dict[str, QuantizedModule] = {}
    faults = []
    for selection in selections:
        statement = selection.statement
        assert isinstance(statement, QuantizeSpec)
        for fqn in selection.names:
            module = modules.by_fqn.get(fqn)
            if isinstance(module, nn.Linear):
                size = _bytes(module, statement.method)
                found[fqn] = QuantizedModule(
                    fqn, statement.method, statement.storage, size, statement.span
                )
            else:
                message = "only the weights of linear layers can be quantised"
                label, span = f"matches `{fqn}`", statement.selector.span
                faults.append(Diagnostic("unsupported-layer", message, span, label))
    diagnostics += once_each(faults)
    return found


def _bytes(module: nn.Linear, method: Word) -> int:
    elements = module.in_features * module.out_features
    if method.name == "int8":
        return elements + 4 * module.out_features
    blocks = -(-elements // _BLOCK)
    scales = 4 * blocks
    if method.argument("double_quant"):
        scales = blocks + 4 * -(-blocks // _SCALES)
    return -(-elements // 2) + scales
