"""The adapters among which a site routes each token, and their prototypes.

P_e = the right singular vector of the largest singular value of B_e A_e, which is the input that
the adapter changes most (Ostapenko et al. 2024, arXiv 2405.11157, §4.1). With general knowledge g,
A_e − mean A_g and B_e − mean B_g stand for A_e and B_e, as PEFT has it (GenKnowSub, arXiv
2505.10939, §3); the adapters themselves stay as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.sites.factors import Factors


class Difference(nn.Module):
    """Holds a `weight`: a factor without what general knowledge has of it."""

    weight: Tensor
    bias = None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)


class Experts(nn.Module):
    """Holds `prototypes` (n, in), at least float32, of n adapters at a site, which are frozen.

    `branches` are theirs, in the same order: those that they have at the site, or differences from
    the mean of those of `general`. Nothing of it is in a state dict: it is of the adapters' values,
    and is right as long as these are the same tensors of the same values (`is_of`).
    """

    prototypes: Tensor

    def __init__(
        self, names: Sequence[str], branches: Sequence[Factors], general: Sequence[Factors]
    ) -> None:
        super().__init__()
        self._made_of = _values(branches, general)
        self._names = tuple(names)
        self.branches = tuple(branches)
        with torch.no_grad():
            if general:
                self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
                self.branches = tuple(self._differences(general))
            own = [prototype(one.A.weight, one.B.weight) for one in self.branches]
            self.register_buffer("prototypes", torch.stack(own), persistent=False)

    def is_of(
        self, names: Sequence[str], branches: Sequence[Factors], general: Sequence[Factors]
    ) -> bool:
        """Whether it would be the same, made anew."""
        values = _values(branches, general)
        return (
            self._names == tuple(names)
            and len(values) == len(self._made_of)
            and all(
                one is other and now == then and now[0] is not None
                for (one, *now), (other, *then) in zip(values, self._made_of, strict=True)
            )
        )

    def _differences(self, general: Sequence[Factors]) -> list[Factors]:
        A = torch.stack([one.A.weight for one in general]).mean(0)
        B = torch.stack([one.B.weight for one in general]).mean(0)
        made = []
        for name, one in zip(self._names, self.branches, strict=True):
            self.lora_A[name] = Difference(one.A.weight - A)
            self.lora_B[name] = Difference(one.B.weight - B)
            both: Any = self.lora_A[name], self.lora_B[name]
            made.append(Factors(*both))
        return made


def prototype(A: Tensor, B: Tensor) -> Tensor:
    """Return the first right singular vector of B A (in,): A (r, in), B (out, r).

    From B = Q R and Aᵀ = Q' R' it is Q' v, of the v of R R'ᵀ (r, r): B A is never made. Computed in
    float64, returned in the dtype of A, at least float32. Zero where B A is; NaN where it is.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    if A.is_meta:
        return torch.empty(A.shape[1], dtype=dtype, device=A.device)
    of_inputs, rows = torch.linalg.qr(A.T.double())
    core = torch.linalg.qr(B.double(), mode="r").R @ rows.T
    if not torch.isfinite(core).all():
        return A.new_full((A.shape[1],), torch.nan, dtype=dtype)
    _, values, directions = torch.linalg.svd(core, full_matrices=False)
    return ((of_inputs @ directions[0]) * (values[0] > 0)).to(dtype)


def _values(branches: Sequence[Factors], general: Sequence[Factors]) -> list[tuple[Any, ...]]:
    """Return each tensor, which values it has, and where and how it lies."""
    tensors = [t for one in (*branches, *general) for t in (one.A.weight, one.B.weight)]
    return [(t, None if t.is_inference() else t._version, t.dtype, t.device) for t in tensors]
