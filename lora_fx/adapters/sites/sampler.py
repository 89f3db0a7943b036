"""What MonteCLoRA keeps at a site, by PEFT's names."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

NAME = "lora_monteclora_sampler"
PRIORS = ("std_prior", "expert_weights_prior")
LAST = ("gaussian_var_prior", "expert_weights")


class Sampler(nn.Module):
    """Holds `std_prior` (r,) and `expert_weights_prior` (n,), which are trained.

    And `gaussian_var_prior` (r, r) and `expert_weights` (n,), the last draw of whoever wrote the
    folder: PEFT's files have them, and nothing is computed of them.
    """

    std_prior: Tensor
    expert_weights_prior: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], trainable: bool) -> None:
        super().__init__()
        for name in PRIORS:
            parameter = nn.Parameter(tensors[f"{NAME}.{name}"], requires_grad=trainable)
            self.register_parameter(name, parameter)
        for name in LAST:
            self.register_buffer(name, tensors[f"{NAME}.{name}"])

    def tensors(self) -> dict[str, Tensor]:
        """Return all of them by their names in a file."""
        return {f"{NAME}.{name}": getattr(self, name) for name in (*PRIORS, *LAST)}


def last_draw(rank: int, samples: int) -> dict[str, Tensor]:
    """Return what stands there before anything is drawn, as in PEFT."""
    draws = (torch.eye(rank), torch.full((samples,), 1 / samples))
    return {f"{NAME}.{name}": draw for name, draw in zip(LAST, draws, strict=True)}
