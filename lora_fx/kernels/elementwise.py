"""`lora_fx::elementwise`: element by element, of a sum whose low-rank term is computed on the way.

    x₀ ← x₀ + P Q          xᵢ: (m, n)   P: (m, r)   Q: (r, n)
    y₀, y₁, … = program(x₀, x₁, …)

A program is a text, one operation for each `;`, and at last what it returns:

    v0 = sigmoid(x1); v1 = mul(x0, v0); v2 = sub(1, v0); return v1, v2

It is computed in float32 (float64 for float64) and rounded once, to the dtype of x₀. On a GPU the
program becomes a Triton kernel that reads each x and writes each y once and never writes P Q;
elsewhere the plain reference below runs.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_RANK = 64
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "exp": torch.exp,
    "reciprocal": torch.reciprocal,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
}
_LINE = re.compile(r"(v\d+) = (\w+)\((.*)\)")
_library = torch.library.Library("lora_fx", "FRAGMENT")
_library.define(
    "elementwise(Tensor[] inputs, Tensor P, Tensor Q, str program) -> Tensor[]",
    tags=(torch.Tag.flexible_layout,),
)


class Line(NamedTuple):
    """One operation: the name of its result, the operation, and names or numbers."""

    result: str
    operation: str
    operands: list[str]


def parse(program: str) -> tuple[list[Line], list[str]]:
    """Return a program's operations, and the names of what it returns."""
    *lines, last = program.split("; ")
    matches = (_LINE.fullmatch(line) for line in lines)
    parsed = [Line(m[1], m[2], m[3].split(", ")) for m in matches if m is not None]
    return parsed, last.removeprefix("return ").split(", ")


def elementwise_reference(
    inputs: Sequence[Tensor], P: Tensor, Q: Tensor, program: str
) -> list[Tensor]:
    """Run the program, operation by operation."""
    dtype = inputs[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    values = {f"x{i}": x.to(wide) for i, x in enumerate(inputs)}
    values["x0"] = values["x0"] + P.to(wide) @ Q.to(wide)
    lines, returned = parse(program)
    for line in lines:
        operands = [values[one] if one in values else float(one) for one in line.operands]
        values[line.result] = OPERATIONS[line.operation](*_tensors(operands, values["x0"]))
    return [values[name].to(dtype) for name in returned]


def _tensors(operands: list[Tensor | float], like: Tensor) -> list[Tensor]:
    return [one if isinstance(one, Tensor) else like.new_tensor(one) for one in operands]


def _on_gpu(inputs: Sequence[Tensor], P: Tensor, Q: Tensor, program: str) -> list[Tensor]:
    from lora_fx.kernels.elementwise_triton import launch

    outputs = _shapes(inputs, P, Q, program)
    launch(inputs, P, Q, outputs, program)
    return outputs


def _shapes(inputs: Sequence[Tensor], P: Tensor, Q: Tensor, program: str) -> list[Tensor]:
    return [inputs[0].new_empty(inputs[0].shape) for _ in parse(program)[1]]


_library.impl("elementwise", elementwise_reference, "CPU")
_library.impl("elementwise", _on_gpu, "CUDA")
torch.library.register_fake("lora_fx::elementwise", _shapes, lib=_library)

elementwise = torch.ops.lora_fx.elementwise.default
