"""What a whole site computes, and a merge: their branches one after another, see `graph/ops.py`."""

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph import references, sample_references
from lora_fx.graph.convolution import by_channel, convolution
from lora_fx.graph.own_tensors import require_samples
from lora_fx.graph.packed import packed_linear
from lora_fx.graph.structure import Branch, Structure


def site(
    y: Tensor,
    x: Tensor,
    params: list[Tensor],
    scalings: Tensor,
    structure: str,
    base: Sequence[Tensor],
    samples: Tensor | None = None,
    invoked: Tensor | None = None,
    prototypes: Tensor | None = None,
) -> Tensor:
    """Add every branch of a site to its base output `y`; `params` is A₀, B₀, A₁, B₁, ….

    Raises LoraFxError if dimension 0 of the input cannot be that of the samples, or if a branch
    waits for an invocation that nobody has looked for, or cannot know the tokens of a sample.
    """
    if samples is not None:
        require_samples(x.shape[0], samples.shape[0])
    parsed = Structure.parse(structure)
    if parsed.is_stack:
        return _stack(y, x, params, scalings, parsed, base, samples)
    assert (parsed.arrow is None) is (prototypes is None), "tokens are routed by prototypes"
    if any(branch.invoked is not None for branch in parsed.branches):
        _require_tokens(x, invoked)
    of_call = samples, invoked, prototypes
    *others, last = parsed.branches
    if not last.many:
        return _layer(y, x, params, scalings, parsed, base, *of_call)
    assert samples is not None
    *own, A, B = params
    if others:
        parsed = replace(parsed, branches=tuple(others))
        y = _layer(y, x, own, scalings, parsed, base, *of_call)
    return sample_references.many(y, x, A, B, scalings[len(others) :], samples, last)


def _stack(
    y: Tensor,
    x: Tensor,
    params: list[Tensor],
    scalings: Tensor,
    parsed: Structure,
    base: Sequence[Tensor],
    samples: Tensor | None,
) -> Tensor:
    offsets = base[0] if base else None
    for i, (A, B, *_) in enumerate(parsed.params(params)):
        branch = parsed.branches[i]
        h = references.stack_shrink(x, A, offsets, branch.compute)
        share = None
        if samples is not None and branch.column is not None:
            share = references.share(samples, branch.column, branch.rest, h.ndim)
        y = references.stack_expand(y, h, B, scalings, i, branch.compute, offsets, share)
    return y


def _layer(
    y: Tensor,
    x: Tensor,
    params: list[Tensor],
    scalings: Tensor,
    parsed: Structure,
    base: Sequence[Tensor],
    samples: Tensor | None,
    invoked: Tensor | None,
    prototypes: Tensor | None,
) -> Tensor:
    of_base, window = y, parsed.window
    places = 0 if window is None else window.dimensions
    routed = None
    if parsed.arrow is not None and prototypes is not None:
        routed = references.arrow(x, prototypes, *parsed.arrow)
    for i, (A, B, bias, m, v, d, priors) in enumerate(parsed.params(params)):
        branch = parsed.branches[i]
        A, B = (
            references.block_diagonal(factor, blocks) if blocks > 1 else factor
            for factor, blocks in zip((A, B), branch.blocks, strict=True)
        )
        B = B if d is None else references.diagonal(B, d)
        A = A if priors is None else references.perturb(A, priors[0], priors[1], branch.noise)
        dropped = F.dropout(x, branch.dropout, training=True) if branch.dropout else x
        if parsed.kind == "embedding":
            h = references.lookup(x, A, parsed.padding, branch.compute)
        elif v is not None:
            compression = v, branch.groups, branch.scale, 0.0, branch.compute
            h = references.compressed_shrink(dropped, A, *compression)
        elif window is not None:
            h = references.convolve(dropped, A, 0.0, branch.compute, str(window))
        else:
            h = references.shrink(dropped, A, 0.0, branch.compute)
        if routed is None:
            share = _share(branch, h.ndim, x, samples, invoked)
        else:
            share = routed.narrow(-1, i, 1)
        alone = y is of_base and not branch.dropout and share is None
        y = references.expand(y, h, B, scalings, i, branch.compute, bias, share)
        if m is not None:
            weight, of_layer = parsed.weight(base)
            own = of_base
            if branch.dropout:
                own, of_layer = _applied(dropped, weight, parsed), []
            u = y if alone else references.expand(own, h, B, scalings, i, branch.compute)
            A, B = A.flatten(1), B.flatten(1)
            of_branch = A, B, scalings, i, parsed.factor
            if parsed.packing is not None:
                norms = references.packed_norms(weight, *of_branch, str(parsed.packing))
            else:
                norms = references.norms(weight[0].flatten(1), *of_branch)
            m, norms, *of_layer = (by_channel(t, places) for t in (m, norms, *of_layer))
            y = references.magnitude(y, u, m, norms, of_layer[0] if of_layer else None, share)
    return y


def _share(
    branch: Branch, dims: int, x: Tensor, samples: Tensor | None, invoked: Tensor | None
) -> Tensor | None:
    """Return what the branch has of each sample, or of each token; None if it has all."""
    share = None
    if samples is not None and branch.column is not None:
        share = references.share(samples, branch.column, branch.rest, dims)
    if invoked is not None and branch.invoked is not None:
        acts = references.invoked(invoked, branch.invoked, x)
        share = acts if share is None else share * acts
    return share


def _applied(x: Tensor, weight: list[Tensor], parsed: Structure) -> Tensor:
    """Apply the base's weight."""
    if parsed.packing is not None:
        return packed_linear(x, weight, str(parsed.packing))
    if parsed.window is not None:
        return convolution(x, weight[0], parsed.window)
    return F.linear(x, weight[0])


def _require_tokens(x: Tensor, invoked: Tensor | None) -> None:
    """Raise LoraFxError unless x is (S, T, in), and it is known where S samples are invoked."""
    if invoked is None:
        message = "an adapter waits for its invocation, and this call has not looked for it"
        help = "call the compiled model itself: it looks for the tokens in its `input_ids`"
        raise LoraFxError((Diagnostic("not-invocable", message, help=help),))
    if x.ndim != 3 or x.shape[0] != invoked.shape[0]:
        message = "an adapter acts from its invocation on, and gets rows that are no tokens of it"
        note = f"its input is {tuple(x.shape)}, and there are {invoked.shape[0]} samples"
        help = "adapt modules that get (samples, tokens, features)"
        raise LoraFxError((Diagnostic("rows-not-samples", message, notes=(note,), help=help),))


def merge(W: Tensor, params: list[Tensor], scalings: Tensor, structure: str) -> Tensor:
    """Add every branch to a weight in the dtype of the scalings, and round once, to its own."""
    parsed = Structure.parse(structure)
    merged = W.to(scalings.dtype)
    for i, (A, B, *_) in enumerate(parsed.params(params)):
        merged = references.delta(merged, A, B, scalings[i], parsed.transposed)
    return merged.to(W.dtype)
