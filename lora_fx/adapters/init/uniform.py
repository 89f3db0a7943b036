"""The uniform draw that `nn.Linear` starts with."""

import math

import torch
from torch import Tensor


def kaiming_uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a (rows, columns) matrix from U(-1/√columns, 1/√columns).

    He et al. 2015, arXiv 1502.01852, §2.2 with slope a = √5, as `nn.Linear` does.
    """
    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
