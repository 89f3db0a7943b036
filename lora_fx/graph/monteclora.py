"""MonteCLoRA: the A of a step in training is drawn around A.

    A' = Σₙ wₙ (A + c · diag(√v) Zₙ) = A + c · diag(√v) Σₙ wₙ Zₙ       Zₙ (r, in) ~ N(0, 1)
    v = max(exp(2 std) ⊙ diag(S), 10⁻³)                                S ~ Wishart(r, I)
    w = softmax(√σ ⊙ z + log α − mean log α)                           z (n,) ~ N(0, 1), α = exp(π)
    σ = (1 − 2 / n) / α + Σ 1/α / n²                                   a Dirichlet's, by Laplace

A: (r, in)   std, v: (r,)   π, α, w, σ: (n,). The diagonal of S is that of Xᵀ X, X (r, r) ~ N(0, 1).
Sengupta et al. 2024, arXiv 2411.04358, §3; Srivastava and Sutton 2017, arXiv 1703.01488, §3.2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Do = Callable[..., Any]
_LEAST = 1e-6


def run(target: Any, *args: Any) -> Tensor:
    """Apply a torch function, or the tensor method of a name."""
    return getattr(args[0], target)(*args[1:]) if isinstance(target, str) else target(*args)


def perturbed(A: Any, std: Any, prior: Any, scale: float, sizes: tuple[int, ...], do: Do) -> Any:
    """Return A' (r, in); `sizes` are n, r and in, `do` applies a function to tensors, or nodes."""
    samples, rank, _ = sizes
    Z = do(torch.randn_like, do("expand", do("unsqueeze", A, 0), *sizes))
    v = variances(std, rank, do)
    w = mixture(prior, samples, do)
    noise = do("sum", do(torch.mul, do("view", w, samples, 1, 1), Z), 0)
    noise = do(torch.mul, do("unsqueeze", do(torch.sqrt, v), 1), noise)
    return do(torch.add, A, do("to", do(torch.mul, noise, scale), A_dtype(A)))


def A_dtype(A: Any) -> torch.dtype:
    """Return the dtype of a tensor, or of a node's value."""
    return A.dtype if isinstance(A, Tensor) else A.meta["example_value"].dtype


def variances(std: Any, rank: int, do: Do = run) -> Any:
    """Draw v (r,)."""
    X = do(torch.randn_like, do("expand", do("unsqueeze", std, 0), rank, rank))
    S = do("sum", do(torch.square, X), 0)
    return do(torch.clamp, do(torch.mul, do(torch.exp, do(torch.mul, std, 2.0)), S), 1e-3)


def mixture(prior: Any, samples: int, do: Do = run) -> Any:
    """Draw w (n,), which adds up to 1."""
    z = do(torch.randn_like, prior)
    alpha = do(torch.clamp, do(torch.exp, prior), _LEAST)
    logs, inverse = do(torch.log, alpha), do(torch.reciprocal, alpha)
    spread = do(torch.div, do("sum", inverse), samples**2)
    spread = do(torch.add, do(torch.mul, inverse, 1 - 2 / samples), spread)
    spread = do(torch.add, do(torch.clamp, spread, _LEAST), _LEAST)
    logits = do(torch.add, do(torch.mul, do(torch.sqrt, spread), z), logs)
    return do(torch.softmax, do(torch.sub, logits, do("mean", logs)), -1)


def divergence(std: Tensor, prior: Tensor, v: Tensor, dirichlet_prior: float) -> Tensor:
    """Return how far what is drawn is from its priors: the sum of three Kullback-Leiblers.

    Dirichlet(exp π) from Dirichlet(`dirichlet_prior`), Wishart(r, diag(exp(2 std))) from
    Wishart(r, I), and N(0, diag v) from N(0, I) for each of n draws. arXiv 2411.04358, §3.4. (PEFT
    adds the second term of the first one, Σ log Γ(αᵢ) − log Γ(α₀), which is subtracted here.)
    """
    rank, samples = len(std), len(prior)
    alpha, other = prior.exp(), torch.full_like(prior, dirichlet_prior)
    dirichlet = (
        alpha.sum().lgamma()
        - other.sum().lgamma()
        - (alpha.lgamma() - other.lgamma()).sum()
        + ((alpha - other) * (alpha.digamma() - alpha.sum().digamma())).sum()
    )
    wishart = 0.5 * rank * ((2 * std).exp().sum() - 2 * std.sum() - rank)
    normal = 0.5 * samples * (v.sum() - v.log().sum() - rank)
    return dirichlet + wishart + normal
