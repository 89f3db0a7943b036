"""`init = lora_ga`: the directions in which full training would move the weight first."""

import torch
from torch import Tensor

from lora_fx.adapters.init.place import Place
from lora_fx.adapters.init.randomised import randomised_svd


def lora_ga(place: Place) -> tuple[Tensor, Tensor]:
    """Take A from r rows of Vᵀ and B from r columns of U Σ, where U Σ Vᵀ is the loss's gradient.

    Of the 2r largest directions, `direction` says which; `scale` says by what they are multiplied.
    The weight loses s B A. Wang et al. 2024, arXiv 2407.05000, §3.2 to 3.4. PEFT's `"lora_ga"`.
    """
    gradient, rank = place.observed.to(place.weight), place.rank
    arguments = dict(place.init.arguments)
    most = min(4 * rank, *gradient.shape)
    U, S, V = randomised_svd(gradient, most, 4, place.generator)
    of_A, of_B = _chosen(arguments["direction"].name, rank, place.generator)  # type: ignore[union-attr]
    A, B = V[of_A], U[:, of_B] * S[of_B]
    match arguments["scale"].name:  # type: ignore[union-attr]
        case "stable":
            gamma = float(arguments["stable_gamma"])  # type: ignore[arg-type]
            return A, B * (len(B) ** 0.25 / gamma**0.5)
        case "weight_svd":
            largest = torch.linalg.matrix_norm(place.weight, 2)
            return A, B * (largest / S[of_B][0].clamp(min=torch.finfo(S.dtype).tiny))
        case "gd_scale":
            return A / place.scaling, B / place.scaling
        case _:
            return A, B


def _chosen(direction: str, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return which of the 2r directions A and B take."""
    every = torch.arange(2 * rank)
    match direction:
        case "ArBr":
            return every[1::2], every[::2]
        case "A2rBr":
            return every[rank:], every[:rank]
        case "ArB2r":
            return every[:rank], every[rank:]
        case _:
            one = torch.randperm(2 * rank, generator=generator)[:rank]
            return one, one
