"""What operators compute of rows, biases and outputs that adapters have of their own.

In torch, as `graph/references.py` does: see `graph/ops.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.graph.own_tensors import (
    mixed,
    mixed_columns,
    mixed_rows,
    require_samples,
    shifted,
)


def replace_rows(
    y: Tensor, ids: Tensor, tokens: Tensor, rows: Tensor, padding: int | None
) -> Tensor:
    """Put a row of its own in the place of each listed token: y (*, out), ids (*) -> (*, out).

    Row `padding` learns nothing.
    """
    hits = ids.unsqueeze(-1) == tokens
    own = F.embedding(hits.to(torch.int32).argmax(-1), rows, padding).to(y.dtype)
    return torch.where(hits.any(-1, keepdim=True), own, y)


def replace_columns(
    y: Tensor, x: Tensor, tokens: Tensor, rows: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute the listed outputs from rows of their own: y (*, out), x (*, in) -> (*, out)."""
    own = F.linear(x, rows.to(x.dtype), None if bias is None else bias[tokens])
    return y.index_copy(-1, tokens, own.to(y.dtype))


def mix(
    y: Tensor, own: list[Tensor], samples: Tensor, columns: list[int], base: Tensor | None = None
) -> Tensor:
    """Put outputs of whole modules into their samples' places: y and each of `own` (S, …)."""
    require_samples(y.shape[0], samples.shape[0])
    return mixed(y, own, samples, columns, base)


def shift(
    y: Tensor,
    own: list[Tensor],
    bias: Tensor,
    samples: Tensor,
    columns: list[int],
    trailing: int,
) -> Tensor:
    """Put biases of their own in the base's place: y (S, …, out, 1…), each of `own` (out,)."""
    require_samples(y.shape[0], samples.shape[0])
    return shifted(y, own, bias, samples, columns, trailing)


def mix_rows(
    y: Tensor,
    base: Tensor,
    ids: Tensor,
    tokens: Tensor,
    rows: Tensor,
    padding: int | None,
    samples: Tensor,
    column: int,
) -> Tensor:
    """Put rows in place as `replace_rows` does, in the samples of one adapter."""
    require_samples(y.shape[0], samples.shape[0])
    return mixed_rows(y, base, ids, tokens, rows, padding, samples, column)


def mix_columns(
    y: Tensor,
    base: Tensor,
    x: Tensor,
    tokens: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    samples: Tensor,
    column: int,
) -> Tensor:
    """Compute outputs as `replace_columns` does, in the samples of one adapter."""
    require_samples(y.shape[0], samples.shape[0])
    return mixed_columns(y, base, x, tokens, rows, bias, samples, column)
