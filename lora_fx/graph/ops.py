"""The `lora_fx::` operators; the `…references.py` beside this file say what they compute.

    site(y, x, params, scalings, structure, base, samples, invoked, prototypes)
                                                       y + sum_i s_i * (B_i A_i drop_i(x) + b_i)
    share(samples, column, rest, dims)                 of each sample, to multiply (S, …)
    invoked(invoked, column, x)                        of each token, 0 or 1, to multiply (S, T, …)
    arrow(x, prototypes, top, temperature)             of each token and branch: `graph/arrow.py`
    shrink(x, A, dropout, compute)                     drop(x) Aᵀ
    compressed_shrink(x, A, v, groups, scale, dropout, compute)    shrink; dA is VeLoRA's
    convolve(x, A, dropout, compute, window)           drop(x) * A, as the layer convolves
    lookup(ids, A, padding, compute)                   columns of A, one for each id
    expand(y, h, B, scalings, branch, compute, bias, share)        y + c ((s h) Bᵀ + s b)
    choose(samples, columns, terms)                    which branches each sample has
    sample_scalings(samples, scalings, columns, branches, which)    s c of those
    pick(factors, which, rank, columns)                of each sample: `graph/picked.py`
    sample_shrink(x, A, dropout, compute)              shrink, by each sample's own A
    sample_expand(y, h, B, factors, compute)           expand, likewise
    take(stack, which, columns)                        of each sample, of factors in one tensor
    spread(values, columns, ranks)                     columns, each as often as its rank
    masked_expand(y, h, B, scalings, shares, compute)  y + (c h) (s B)ᵀ, of factors side by side
    stack_shrink(x, A, offsets, compute)               x Aᵀ, of each matrix of a stack
    stack_expand(y, h, B, scalings, branch, compute, offsets, share)   y + c ((s h) Bᵀ), likewise
    block_diagonal(weight, blocks)                     the rows' chunks on a diagonal
    diagonal(B, d)                                     B diag(d)
    perturb(A, std, prior, noise)                      drawn around A: `graph/monteclora.py`
    norms(W, A, B, scalings, branch, factor)           of the rows of W + s B A, no gradient
    packed_norms(tensors, A, B, scalings, branch, factor, packing)    norms; W in 4 or 8 bits
    magnitude(y, u, m, norms, bias, share)             y + c (m / norms - 1) * (u - bias)
    replace_rows(y, ids, tokens, rows, padding)        y, and rows[i] where the id is tokens[i]
    replace_columns(y, x, tokens, rows, bias)          y, and x rows[i]ᵀ + bias in column tokens[i]
    mix(y, own, samples, columns, base)                y + Σ c_i (own_i - y), of each sample
    shift(y, own, bias, samples, columns, trailing)    y + Σ c_i (own_i - bias), likewise
    mix_rows(y, base, ids, tokens, rows, padding, samples, column)         replace_rows, likewise
    mix_columns(y, base, x, tokens, rows, bias, samples, column)   replace_columns, likewise
    merge(W, params, scalings, structure)              W + sum_i s_i B_i A_i
    delta(W, A, B, scaling, transposed)                W + s B A

x: (*, in)   A: (r, in)   B: (out, r)   y: (*, out)   h: (*, r)   scalings: float32 (branches,)
b: (out,)   d: (r,)   ids: (*)   tokens: (n,)   rows: (n, in or out)   W: (out, in)
m, norms: (out,)
In a mixed batch `samples` (S, adapters), float32, are the shares that adapters have in each sample:
dimension 0 of x and y is then S, and a branch's share c in a sample multiplies all it adds there.
Without them c is 1. `columns` are where those of adapters with tensors of their own stand, see
`graph/own_tensors.py`. Of a branch that acts from its invocation on (aLoRA, arXiv 2504.12397), c is
also 0 for all tokens but the last of each sample, as many as `invoked` (S, adapters), int64, says;
x is then (S, T, in). Where tokens are routed (Arrow, arXiv 2405.11157), c is of each row of x.
Where `merge` and `delta` are given W as (in, out), B A is transposed. Of a convolution, all have
places behind their features: x (*, in, …), A (r, in, k…), B (out, r / groups, 1…), y (*, out, …).
Of a stack, x, y, A and B have one more dimension in front, or, with `offsets` (E,), the rows of x
and y belong to the matrices in their order, see `graph/grouped.py`; a site has those in `base`. In
a mixed batch it gets `samples` (R, adapters) of the R rows of x, whatever samples those are of.
Hu et al. 2021, arXiv 2106.09685, §4.1, eq. 3. Of an embedding, x is one-hot and `in` its rows.
With a magnitude m, DoRA's branch is what makes W x to (m / ‖W + s B A‖) (W + s B A) x: Liu et al.
2024, arXiv 2402.09353, eq. 5. Several branches add up what each alone adds to W x. `base` is W and
the base's bias, if there is one, where a branch needs them; a W in 4 or 8 bits is the tensors that
it is packed in, see `graph/packing.py`. Operators on those: `graph/packed.py`.

All are CompositeImplicitAutograd: one node in a captured graph, decomposed by autograd and
`torch.compile`, so no derivative or shape formula has to be kept in step. They are the plain
differentiable path that every rewrite is compared with.
"""

import torch

from lora_fx.graph import own_references, references, sample_references, site_references

_library = torch.library.Library("lora_fx", "DEF")
_library.define(
    "site(Tensor y, Tensor x, Tensor[] params, Tensor scalings, str structure, "
    "Tensor[] base, Tensor? samples=None, Tensor? invoked=None, Tensor? prototypes=None) -> Tensor"
)
_library.define("share(Tensor samples, int column, bool rest, int dims) -> Tensor")
_library.define("invoked(Tensor invoked, int column, Tensor x) -> Tensor")
_library.define("arrow(Tensor x, Tensor prototypes, int top, float temperature) -> Tensor")
_library.define("shrink(Tensor x, Tensor A, float dropout, str compute) -> Tensor")
_library.define(
    "compressed_shrink(Tensor x, Tensor A, Tensor v, int groups, float scale, float dropout, "
    "str compute) -> Tensor"
)
_library.define("convolve(Tensor x, Tensor A, float dropout, str compute, str window) -> Tensor")
_library.define("lookup(Tensor ids, Tensor A, int? padding, str compute) -> Tensor")
_library.define(
    "expand(Tensor y, Tensor h, Tensor B, Tensor scalings, int branch, str compute, "
    "Tensor? bias=None, Tensor? share=None) -> Tensor"
)
_library.define("choose(Tensor samples, int[] columns, int terms) -> Tensor")
_library.define(
    "sample_scalings(Tensor samples, Tensor scalings, int[] columns, int[] branches, Tensor which) "
    "-> Tensor"
)
_library.define("sample_shrink(Tensor x, Tensor A, float dropout, str compute) -> Tensor")
_library.define(
    "sample_expand(Tensor y, Tensor h, Tensor B, Tensor factors, str compute) -> Tensor"
)
_library.define("take(Tensor stack, Tensor which, bool columns) -> Tensor")
_library.define("spread(Tensor values, int[] columns, int[] ranks) -> Tensor")
_library.define(
    "masked_expand(Tensor y, Tensor h, Tensor B, Tensor scalings, Tensor shares, str compute) "
    "-> Tensor"
)
_library.define("stack_shrink(Tensor x, Tensor A, Tensor? offsets, str compute) -> Tensor")
_library.define(
    "stack_expand(Tensor y, Tensor h, Tensor B, Tensor scalings, int branch, str compute, "
    "Tensor? offsets, Tensor? share=None) -> Tensor"
)
_library.define("block_diagonal(Tensor weight, int blocks) -> Tensor")
_library.define("diagonal(Tensor B, Tensor d) -> Tensor")
_library.define("perturb(Tensor A, Tensor std, Tensor prior, float noise) -> Tensor")
_library.define(
    "norms(Tensor W, Tensor A, Tensor B, Tensor scalings, int branch, float factor) -> Tensor"
)
_library.define(
    "packed_norms(Tensor[] tensors, Tensor A, Tensor B, Tensor scalings, int branch, float factor, "
    "str packing) -> Tensor"
)
_library.define(
    "magnitude(Tensor y, Tensor u, Tensor m, Tensor norms, Tensor? bias=None, "
    "Tensor? share=None) -> Tensor"
)
_library.define(
    "replace_rows(Tensor y, Tensor ids, Tensor tokens, Tensor rows, int? padding) -> Tensor"
)
_library.define(
    "replace_columns(Tensor y, Tensor x, Tensor tokens, Tensor rows, Tensor? bias) -> Tensor"
)

_library.define(
    "mix(Tensor y, Tensor[] own, Tensor samples, int[] columns, Tensor? base=None) -> Tensor"
)
_library.define(
    "shift(Tensor y, Tensor[] own, Tensor bias, Tensor samples, int[] columns, int trailing) "
    "-> Tensor"
)
_library.define(
    "mix_rows(Tensor y, Tensor base, Tensor ids, Tensor tokens, Tensor rows, int? padding, "
    "Tensor samples, int column) -> Tensor"
)
_library.define(
    "mix_columns(Tensor y, Tensor base, Tensor x, Tensor tokens, Tensor rows, Tensor? bias, "
    "Tensor samples, int column) -> Tensor"
)
_library.define("merge(Tensor W, Tensor[] params, Tensor scalings, str structure) -> Tensor")
_library.define("delta(Tensor W, Tensor A, Tensor B, Tensor? scaling, bool transposed) -> Tensor")

for _of, _names in {
    references: (
        *("shrink", "compressed_shrink", "convolve", "lookup", "share", "invoked"),
        *("arrow", "expand"),
        *("stack_shrink", "stack_expand", "block_diagonal", "diagonal", "perturb"),
        *("norms", "packed_norms", "magnitude", "delta"),
    ),
    own_references: (
        *("replace_rows", "replace_columns", "mix", "shift", "mix_rows", "mix_columns"),
    ),
    sample_references: (
        *("choose", "sample_scalings", "sample_shrink", "sample_expand", "take"),
        *("spread", "masked_expand"),
    ),
    site_references: ("site", "merge"),
}.items():
    for _name in _names:
        _library.impl(_name, getattr(_of, _name), "CompositeImplicitAutograd")

site = torch.ops.lora_fx.site.default
shrink = torch.ops.lora_fx.shrink.default
compressed_shrink = torch.ops.lora_fx.compressed_shrink.default
convolve = torch.ops.lora_fx.convolve.default
lookup = torch.ops.lora_fx.lookup.default
share = torch.ops.lora_fx.share.default
invoked = torch.ops.lora_fx.invoked.default
arrow = torch.ops.lora_fx.arrow.default
expand = torch.ops.lora_fx.expand.default
choose = torch.ops.lora_fx.choose.default
sample_scalings = torch.ops.lora_fx.sample_scalings.default
sample_shrink = torch.ops.lora_fx.sample_shrink.default
sample_expand = torch.ops.lora_fx.sample_expand.default
take = torch.ops.lora_fx.take.default
spread = torch.ops.lora_fx.spread.default
masked_expand = torch.ops.lora_fx.masked_expand.default
stack_shrink = torch.ops.lora_fx.stack_shrink.default
stack_expand = torch.ops.lora_fx.stack_expand.default
block_diagonal = torch.ops.lora_fx.block_diagonal.default
diagonal = torch.ops.lora_fx.diagonal.default
perturb = torch.ops.lora_fx.perturb.default
norms = torch.ops.lora_fx.norms.default
packed_norms = torch.ops.lora_fx.packed_norms.default
magnitude = torch.ops.lora_fx.magnitude.default
replace_rows = torch.ops.lora_fx.replace_rows.default
replace_columns = torch.ops.lora_fx.replace_columns.default
mix = torch.ops.lora_fx.mix.default
shift = torch.ops.lora_fx.shift.default
mix_rows = torch.ops.lora_fx.mix_rows.default
mix_columns = torch.ops.lora_fx.mix_columns.default
merge = torch.ops.lora_fx.merge.default
delta = torch.ops.lora_fx.delta.default
