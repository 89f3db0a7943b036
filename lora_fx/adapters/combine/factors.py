"""Branches of one site combined into one: A (r, in), B (out, r), b (out,), with scaling 1.

    cat     A = [wᵢ sᵢ Aᵢ], B = [Bᵢ]                     exactly Σ wᵢ sᵢ Bᵢ Aᵢ, r = Σ rᵢ
    svd     the best of rank r to that sum               Eckart and Young 1936
    linear  A = Σ ±√|wᵢ sᵢ| Aᵢ, B = Σ √|wᵢ sᵢ| Bᵢ       PEFT's, with products of B_i and A_j
    others  the operator on the Aᵢ and on the Bᵢ with those roots; `…_svd` on the products
            sᵢ Bᵢ Aᵢ with the weights wᵢ, and then as svd

b = Σ wᵢ sᵢ bᵢ. Of an embedding A is (r, rows) and B (width, r): the same. Of a convolution A is
(r, in · k) and B (out, r / groups): products are of each group by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_fx.adapters.combine.operators import Method, apply

Factors = tuple[Tensor, Tensor]

ANY_RANKS = ("cat", "svd")  # these, and what ends on `_svd`


@dataclass(frozen=True)
class Part:
    """One branch with its weight in a mix; `scaling` is what multiplies B A."""

    weight: float
    scaling: float
    A: Tensor
    B: Tensor
    bias: Tensor | None

    @property
    def factor(self) -> float:
        """What multiplies B A in the mix."""
        return self.weight * self.scaling


def merges_any_ranks(name: str) -> bool:
    """Whether a method combines branches of different ranks."""
    return name in ANY_RANKS or name.endswith("_svd")


def rank_of(name: str, ranks: Sequence[int], rank: int | None) -> int:
    """Return the rank of a combination of branches of these ranks, or the `rank` asked for."""
    return rank or (sum(ranks) if name == "cat" else max(ranks))


def combine(
    method: Method,
    parts: Sequence[Part],
    rank: int | None,
    generator: torch.Generator,
    groups: int = 1,
) -> Factors:
    """Return A and B of the combination, in the dtype of the parts; `rank` compresses it."""
    if groups > 1 and merges_any_ranks(method.name):
        own_rank = None if rank is None else rank // groups
        of_groups = zip(*(_by_group(part, groups) for part in parts), strict=True)
        found = [combine(method, group, own_rank, generator) for group in of_groups]
        return _joined(found)
    if method.name in ANY_RANKS or (method.name == "linear" and len(parts) == 1):
        A, B = _stacked(parts)
        compressed = method.name == "svd" or rank is not None
    elif method.name.endswith("_svd"):
        plain = Method(method.name.removesuffix("_svd"), method.density, method.sign)
        products = [part.scaling * (part.B @ part.A) for part in parts]
        product = apply(plain, products, [part.weight for part in parts], generator)
        return _dense_svd(product, rank_of(method.name, _ranks(parts), rank))
    else:
        roots = [math.sqrt(abs(part.factor)) for part in parts]
        signed = [math.copysign(root, p.factor) for root, p in zip(roots, parts, strict=True)]
        A = apply(method, [part.A for part in parts], signed, generator)
        B = apply(method, [part.B for part in parts], roots, generator)
        compressed = rank is not None
    if not compressed:
        return A, B
    own_rank = rank_of(method.name, _ranks(parts), rank) // groups
    of_groups = zip(A.chunk(groups), B.chunk(groups), strict=True)
    found = [_compressed(*factors, own_rank) for factors in of_groups]
    return _joined(found)


def combine_biases(parts: Sequence[Part]) -> Tensor | None:
    """Return the bias of B: a sum, whatever becomes of the factors; None if no part has one."""
    biases = [part.factor * part.bias for part in parts if part.bias is not None]
    return torch.stack(biases).sum(0) if biases else None


def clamp(factors: Factors, quantile: float) -> Factors:
    """Limit both factors to what is the quantile of all their values (PEFT's `svd_clamp`)."""
    A, B = factors
    most = torch.quantile(torch.cat([B.flatten(), A.flatten()]), quantile)
    return A.clamp(-most, most), B.clamp(-most, most)


def _joined(groups: Sequence[Factors]) -> Factors:
    if len(groups) == 1:
        return groups[0]
    As, Bs = zip(*groups, strict=True)
    return torch.cat(As), torch.cat(Bs)


def _by_group(part: Part, groups: int) -> list[Part]:
    factors = zip(part.A.chunk(groups), part.B.chunk(groups), strict=True)
    return [replace(part, A=A, B=B, bias=None) for A, B in factors]


def _ranks(parts: Sequence[Part]) -> list[int]:
    return [part.A.shape[0] for part in parts]


def _stacked(parts: Sequence[Part]) -> Factors:
    return torch.cat([p.factor * p.A for p in parts]), torch.cat([p.B for p in parts], 1)


def _compressed(A: Tensor, B: Tensor, rank: int) -> Factors:
    """Return the best factors of a rank for B A, by an SVD in the space of their own rank.

    B A = Q_B (R_B R_Aᵀ) Q_Aᵀ with B = Q_B R_B and Aᵀ = Q_A R_A: nothing of (out, in) is made.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.t())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)
    return _cut(Q_B @ U, S, Vh @ Q_A.t(), rank)


def _dense_svd(product: Tensor, rank: int) -> Factors:
    U, S, Vh = torch.linalg.svd(product, full_matrices=False)
    return _cut(U, S, Vh, rank)


def _cut(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> Factors:
    """Return the first `rank` directions, with zeros where there are fewer."""
    there = min(rank, len(S))
    A, B = Vh[:rank], U[:, :rank] * S[:rank]
    missing = rank - there
    A = torch.cat([A, A.new_zeros(missing, A.shape[1])])
    return A, torch.cat([B, B.new_zeros(B.shape[0], missing)], 1)
