"""Arrow routing: which of several branches each token gets, and how much (arXiv 2405.11157).

    z = |x Pᵀ|        c = softmax of the k largest of z / τ, 0 for the others

x (*, in); P (n, in), a prototype for each branch; c (*, n), whose rows add up to 1. With k ≥ n all
branches take part. Ostapenko et al. 2024, §4.1: of a branch's B A the prototype is the direction in
which it changes inputs most, whose sign means nothing.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F

from lora_fx.graph.monteclora import Do, run


def arrow_shares(x: Any, prototypes: Any, top: int, temperature: float, do: Do = run) -> Any:
    """Return c (*, n); x and the prototypes have the dtype of the arithmetic.

    `do` carries out a step, or makes a node of it.
    """
    z = do(torch.abs, do(F.linear, x, prototypes))
    if top >= _count(prototypes):
        return do(torch.softmax, do(torch.div, z, temperature), -1)
    largest = do(torch.topk, z, top, -1)
    values, places = (do(operator.getitem, largest, i) for i in range(2))
    c = do(torch.softmax, do(torch.div, values, temperature), -1)
    return do(torch.scatter, do(torch.zeros_like, z), -1, places, c)


def _count(prototypes: Any) -> int:
    value = prototypes if isinstance(prototypes, torch.Tensor) else prototypes.meta["example_value"]
    return value.shape[0]
