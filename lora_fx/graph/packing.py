"""How a weight in 4 or 8 bits is packed, and its values, a few rows at a time.

    nf4, fp4    blocks of the flattened weight: a level of 16 for each element, times a scale
    int8        rows: a whole number up to 127 for each element, times a scale / 127

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3; Dettmers et al. 2022 (LLM.int8), arXiv
2208.07339, §2. Bitsandbytes' formats. Scales that are `nested` are in 8 bits themselves, in blocks.
The tensors of a weight are what is packed and, behind it:

    nf4, fp4    scales (blocks,)
      nested    scales (blocks,) in 8 bits, their offset (), their own scales, their levels (256,)
    int8        scales (out,)
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_TEXT = re.compile(r"(\w+):(\d+)x(\d+):(\w+):(\d+)(?:\+(\d+))?")
_AT_ONCE = 1 << 22  # elements, of which float32 takes 16 MB


@dataclass(frozen=True)
class Packing:
    """A weight (out, in) by `method`, whose values are of `dtype`; a block's scale in `block`."""

    method: str
    shape: tuple[int, int]
    dtype: torch.dtype
    block: int = 0
    nested: int = 0

    def __str__(self) -> str:
        rows, columns = self.shape
        nested = f"+{self.nested}" if self.nested else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.method}:{rows}x{columns}:{dtype}:{self.block}{nested}"

    @staticmethod
    @cache
    def parse(text: str) -> "Packing":
        """Read a text back; `Packing.parse(str(p)) == p`. Raises ValueError for any other."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(f"`{text}` is not a packing of a structure")
        method, rows, columns, dtype, block, nested = found.groups()
        shape = int(rows), int(columns)
        return Packing(method, shape, getattr(torch, dtype), int(block), int(nested or 0))

    @property
    def tensors(self) -> int:
        """How many tensors a weight consists of."""
        return 5 if self.nested else 2

    def values(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the whole weight (out, in)."""
        return torch.cat([rows for _, rows in self.rows(tensors)])

    def rows(self, tensors: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weight some rows after others, and which these are."""
        rows, columns = self.shape
        unit = max(self.block, 2) // math.gcd(columns, max(self.block, 2))
        step = unit * max(1, _AT_ONCE // (columns * unit))
        unpack = self._eight_bits if self.method == "int8" else self._four_bits
        scales = self._scales(tensors[1:])
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield part, unpack(tensors[0], scales, part)

    def _scales(self, scales: Sequence[Tensor]) -> Tensor:
        if not self.nested:
            return scales[0]
        packed, offset, own, levels = scales
        blocks = torch.ops.bitsandbytes.dequantize_blockwise.default
        return blocks(packed, own, levels, self.nested, torch.float32) + offset

    def _four_bits(self, packed: Tensor, scales: Tensor, part: slice) -> Tensor:
        columns = self.shape[1]
        start, end = part.start * columns, part.stop * columns
        codes = packed.view(torch.uint8).flatten()[start // 2 : -(-end // 2)].view(-1, 1)
        own = scales[start // self.block : -(-end // self.block)]
        shape = [part.stop - part.start, columns]
        unpack = torch.ops.bitsandbytes.dequantize_4bit.default
        return unpack(codes, own, self.block, self.method, shape, self.dtype)

    def _eight_bits(self, packed: Tensor, scales: Tensor, part: slice) -> Tensor:
        return packed[part].to(self.dtype) * (scales[part, None] / 127).to(self.dtype)
