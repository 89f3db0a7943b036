"""Branches of one site combined into one: A (r, in), B (out, r), b (out,), with scaling 1.

    cat     A = [wᵢ sᵢ Aᵢ], B = [Bᵢ]                     exactly Σ wᵢ sᵢ Bᵢ Aᵢ, r = Σ rᵢ
    linear  the same, r = min(Σ rᵢ, in, out)             PEFT's with `cross_terms`, below
    svd     the best of rank r to that sum               Eckart and Young 1936
    others  the operator on the Aᵢ with the weights ±√|wᵢ sᵢ|, and on the Bᵢ with √|wᵢ sᵢ|;
            `…_svd` on the products sᵢ Bᵢ Aᵢ with the weights wᵢ, and then as svd

With `cross_terms` linear is such an operator, the sum, and has products of Bᵢ and Aⱼ in it.

b = Σ wᵢ sᵢ bᵢ. Of an embedding A is (r, rows) and B (width, r): the same. Of a convolution A is
(r, in · k) and B (out, r / groups): products are of each group by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_fx.adapters.combine.operators import Method, apply
from lora_fx.adapters.combine.part import Part

Factors = tuple[Tensor, Tensor]


def merges_any_ranks(method: Method) -> bool:
    """Whether a method combines branches of different ranks: it is of the products B A."""
    name = method.name
    return name in ("cat", "svd") or name.endswith("_svd") or _is_exact_sum(method)


def rank_of(method: Method, ranks: Sequence[int], rank: int | None, largest: int) -> int:
    """Return the rank of a combination of branches of these ranks, or the `rank` asked for.

    `largest` is the one beyond which a product says nothing more.
    """
    if method.name == "cat":
        return rank or sum(ranks)
    return rank or (min(sum(ranks), largest) if _is_exact_sum(method) else max(ranks))


def _is_exact_sum(method: Method) -> bool:
    return method.name == "linear" and not method.cross_terms


def combine(
    method: Method,
    parts: Sequence[Part],
    rank: int | None,
    generator: torch.Generator,
    groups: int = 1,
) -> Factors:
    """Return A and B of the combination, in the dtype of the parts; `rank` compresses it."""
    if groups > 1 and merges_any_ranks(method):
        own_rank = None if rank is None else rank // groups
        of_groups = zip(*(_by_group(part, groups) for part in parts), strict=True)
        return _joined([combine(method, group, own_rank, generator) for group in of_groups])
    ranks, largest = [len(part.A) for part in parts], min(parts[0].A.shape[1], len(parts[0].B))
    wanted = rank_of(method, ranks, rank, largest)
    if method.name.endswith("_svd"):
        plain = replace(method, name=method.name.removesuffix("_svd"))
        products = [part.scaling * (part.B @ part.A) for part in parts]
        return _dense_svd(
            apply(plain, products, [part.weight for part in parts], generator), wanted
        )
    if merges_any_ranks(method) or (method.name == "linear" and len(parts) == 1):
        A, B = _stacked(parts)
    else:
        roots = [math.sqrt(abs(part.factor)) for part in parts]
        signed = [math.copysign(root, p.factor) for root, p in zip(roots, parts, strict=True)]
        A = apply(method, [part.A for part in parts], signed, generator)
        B = apply(method, [part.B for part in parts], roots, generator)
    if wanted == len(A) and rank is None:
        return A, B
    of_groups = zip(A.chunk(groups), B.chunk(groups), strict=True)
    return _joined([_compressed(*factors, wanted // groups) for factors in of_groups])


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
