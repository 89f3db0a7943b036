"""Outputs of a module of which adapters have tensors of their own, in a mixed batch.

y is the base's output, yᵢ that of adapter i by tensors of its own, cᵢ (S, 1, …) its share in each
sample: y + Σ cᵢ (yᵢ − y), so that a sample of one adapter has that adapter's output, whatever those
of others are, and a sample of the base the base's, bit for bit. In float32, or y's wider dtype.

Written once, with `do`, for tensors and for the nodes of a graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph.monteclora import Do, run


def mixed(
    y: Any, own: Sequence[Any], samples: Any, columns: Sequence[int], base: Any, do: Do = run
) -> Any:
    """Return y (S, …) with the outputs `own` of whole modules in their samples' places.

    `base` is the base's output where y is more than that, None where y is it.
    """
    shares = [_share(samples, column, _ndim(y), do) for column in columns]
    if base is None:
        rest = do(torch.rsub, _sum(shares, do), 1)
        total = _part(rest, y, do)
        for share, one in zip(shares, own, strict=True):
            total = do(torch.add, total, _part(share, one, do))
        return do("to", total, _dtype(y))
    wide = torch.promote_types(_dtype(y), torch.float32)
    total, before = do("to", y, wide), do("to", base, wide)
    for share, one in zip(shares, own, strict=True):
        change = do(torch.sub, do("to", one, wide), before)
        total = do(torch.add, total, _part(share, change, do))
    return do("to", total, _dtype(y))


def shifted(
    y: Any,
    own: Sequence[Any],
    bias: Any,
    samples: Any,
    columns: Sequence[int],
    trailing: int,
    do: Do = run,
) -> Any:
    """Return y (S, …, out, 1…) with the biases `own` (out,) in the place of the base's.

    `trailing` dimensions of y are behind that of the bias.
    """
    wide = torch.promote_types(_dtype(y), torch.float32)
    base, total = do("to", bias, wide), do("to", y, wide)
    for one, column in zip(own, columns, strict=True):
        change = do(torch.sub, do("to", one, wide), base)
        if trailing:
            change = do("reshape", change, -1, *[1] * trailing)
        share = _share(samples, column, _ndim(y), do)
        total = do(torch.add, total, do(torch.mul, share, change))
    return do("to", total, _dtype(y))


def mixed_rows(
    y: Any,
    base: Any,
    ids: Any,
    tokens: Any,
    rows: Any,
    padding: int | None,
    samples: Any,
    column: int,
    do: Do = run,
) -> Any:
    """Return y (S, …, out) with an adapter's rows (n, out) for its tokens (n,) among ids (S, …)."""
    hits = do(torch.eq, do("unsqueeze", ids, -1), tokens)
    which = do("argmax", do("to", hits, torch.int32), -1)
    own = do(F.embedding, which, rows, padding)
    wide = torch.promote_types(_dtype(y), torch.float32)
    change = do(torch.sub, do("to", own, wide), do("to", base, wide))
    change = _part(_share(samples, column, _ndim(y), do), change, do)
    change = do(torch.where, do(torch.any, hits, -1, True), change, 0.0)
    return do("to", do(torch.add, do("to", y, wide), change), _dtype(y))


def mixed_columns(
    y: Any,
    base: Any,
    x: Any,
    tokens: Any,
    rows: Any,
    bias: Any,
    samples: Any,
    column: int,
    do: Do = run,
) -> Any:
    """Return y (S, …, out) with outputs for an adapter's tokens (n,) by its rows (n, in)."""
    biases = () if bias is None else (do(torch.index_select, bias, 0, tokens),)
    own = do(F.linear, x, do("to", rows, _dtype(x)), *biases)
    wide = torch.promote_types(_dtype(y), torch.float32)
    there, before = (do("to", do(torch.index_select, t, -1, tokens), wide) for t in (y, base))
    change = do(torch.sub, do("to", own, wide), before)
    change = _part(_share(samples, column, _ndim(y), do), change, do)
    new = do("to", do(torch.add, there, change), _dtype(y))
    return do(torch.index_copy, y, -1, tokens, new)


def require_samples(rows: int, samples: int) -> None:
    """Raise LoraFxError if dimension 0 of what a module has cannot be that of the samples."""
    if rows != samples:
        message = "a mixed batch reaches an adapted module in rows that are not its samples"
        note = f"dimension 0 of its input has {rows} rows, and there are {samples} samples"
        help = "adapt other modules, or call the model with one adapter at a time: `set_adapter`"
        raise LoraFxError((Diagnostic("rows-not-samples", message, notes=(note,), help=help),))


def _share(samples: Any, column: int, dims: int, do: Do) -> Any:
    return do("reshape", do(torch.select, samples, 1, column), -1, *[1] * (dims - 1))


def _part(share: Any, value: Any, do: Do) -> Any:
    """Return share · value, nothing where the share is zero, whatever the value is."""
    return do(torch.where, do(torch.ne, share, 0), do(torch.mul, share, value), 0.0)


def _sum(shares: Sequence[Any], do: Do) -> Any:
    total, *others = shares
    for share in others:
        total = do(torch.add, total, share)
    return total


def _value(tensor: Any) -> Tensor:
    """Return a tensor, or the example of a node's."""
    return tensor if isinstance(tensor, Tensor) else tensor.meta["example_value"]


def _dtype(tensor: Any) -> torch.dtype:
    return _value(tensor).dtype


def _ndim(tensor: Any) -> int:
    return _value(tensor).ndim
