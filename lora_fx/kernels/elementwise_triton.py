"""Triton kernels behind `lora_fx::elementwise`, one for each program; imported where a GPU is."""

# pyright: reportMissingImports=false
import linecache
from collections.abc import Sequence
from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from lora_fx.kernels.elementwise import Line, parse

_ROWS, _COLUMNS, _WARPS = 16, 256, 8  # of a tile
_ROWS_FLOAT32 = 64  # where P and Q are float32: each tile reads its part of Q anew
_SPELLED = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "exp": "tl.exp({})",
    "reciprocal": "1.0 / {}",
    "sigmoid": "tl.sigmoid({})",
    "tanh": "libdevice.tanh({})",
    "erf": "tl.erf({})",
}
_SOURCE = """\
def kernel({arguments}, P, Q, m, n, r, P0, P1, Q0, Q1,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr):
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < m) & (columns < n)
    place = rows.to(tl.int64)
    ranks = tl.arange(0, RANK)
    left = P + place * P0 + ranks[None, :] * P1
    right = Q + ranks[:, None] * Q0 + columns * Q1
    p = tl.load(left, mask=(rows < m) & (ranks[None, :] < r), other=0.0)
    q = tl.load(right, mask=(ranks[:, None] < r) & (columns < n), other=0.0)
{body}
"""


def launch(
    inputs: Sequence[Tensor], P: Tensor, Q: Tensor, outputs: Sequence[Tensor], program: str
) -> None:
    """Fill the outputs. What is given has columns side by side, but for P and Q."""
    (m, n), r = inputs[0].shape, P.shape[1]
    given = [x if x.stride(1) == 1 else x.contiguous() for x in inputs]
    tensors = [each for x in (*given, *outputs) for each in (x, x.stride(0))]
    rows = _ROWS_FLOAT32 if P.dtype.itemsize > 2 else _ROWS
    grid = (triton.cdiv(n, _COLUMNS), triton.cdiv(m, rows))
    _kernel(program, len(inputs))[grid](
        *tensors, P, Q, m, n, r, *P.stride(), *Q.stride(),
        ROWS=rows, COLUMNS=_COLUMNS, RANK=max(16, triton.next_power_of_2(r)), num_warps=_WARPS,
    )  # fmt: skip


@cache
def _kernel(program: str, inputs: int) -> Any:
    """Compile a program's text; Triton reads the source where Python's tracebacks do."""
    source = source_of(program, inputs)
    name = f"<lora_fx elementwise {program}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    scope = {"__name__": __name__, "tl": tl, "libdevice": libdevice}
    exec(compile(source, name, "exec"), scope)
    return triton.jit(scope["kernel"], do_not_specialize=["m"])


def source_of(program: str, inputs: int) -> str:
    """Return the kernel's source."""
    lines, returned = parse(program)
    places = [f"x{i}" for i in range(inputs)] + [f"y{i}" for i in range(len(returned))]
    arguments = ", ".join(f"{name}_, {name}_0" for name in places)
    body = [_load(f"x{i}") for i in range(inputs)]
    body += ['x0 = x0 + tl.dot(p, q, input_precision="ieee")', *map(_spelled, lines)]
    body += [_store(f"y{i}", value) for i, value in enumerate(returned)]
    return _SOURCE.format(arguments=arguments, body="\n".join("    " + line for line in body))


def _load(name: str) -> str:
    where = f"{name}_ + place * {name}_0 + columns"
    return f"{name} = tl.load({where}, mask=inside, other=0.0).to(tl.float32)"


def _store(name: str, value: str) -> str:
    return f"tl.store({name}_ + place * {name}_0 + columns, {value}, mask=inside)"


def _spelled(line: Line) -> str:
    operands = [one if one[0] in "xv" else repr(float(one)) for one in line.operands]
    return f"{line.result} = {_SPELLED[line.operation].format(*operands)}"
