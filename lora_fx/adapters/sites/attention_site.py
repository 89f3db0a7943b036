"""`nn.MultiheadAttention` with adapters on its matrices.

torch's own forward gives the weights of all projections to one function, and in evaluation to one
kernel. While adapters add to any of them, this one projects as linear layers do, W x and the
low-rank branches beside it, and attends in between.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.adapters.dynamic_class import specialise
from lora_fx.adapters.sites.attend import Masks, attend
from lora_fx.adapters.sites.choice import Choice, choose
from lora_fx.adapters.sites.parameter_site import SITES, ParameterSite, mark_parameter
from lora_fx.adapters.sites.site import Site
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.attention import PACKED, SEPARATE
from lora_fx.plan.kinds import layer_of

if TYPE_CHECKING:
    _Base = nn.MultiheadAttention
else:
    _Base = object


class ProjectionSite(ParameterSite):
    """The adapters of an input projection: those of a linear layer, of which rows are computed.

    The rows of queries, keys and values lie one after the other in W and in B. In a mixed batch all
    adapters are computed for all samples: none are gathered here.
    """

    def _choose(self, added: Any, terms: int = 0, stack: Any = None) -> Choice:
        return choose("linear", added)

    @property
    def lora_base_bias(self) -> Tensor | None:
        """The part of `in_proj_bias` that is for this projection."""
        (owner, name), (high, _) = self.lora_place, self.weight.shape
        bias = owner._parameters["in_proj_bias"]
        first = 0 if name == PACKED else SEPARATE.index(name) * high
        return None if bias is None else bias[first : first + high]

    def project(self, x: Tensor, bias: Tensor | None, rows: slice | None) -> Tensor:
        """Return x (*, in) times these rows of the matrix, or all, and of the branches."""
        weight = self.weight if rows is None else self.weight[rows]
        return self._announced(F.linear(x, weight, bias), x, rows)


class AttentionSite(_Base):
    """Mixin for an `nn.MultiheadAttention` that computes as torch's does.

    Dropout of an adapter is of what its projection gets: where queries, keys and values are one
    tensor, they are projected, and dropped of, together.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with the branches of the projections; shapes are those of torch's class."""
        if not any(site.adds for site in self._sites()):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if query.is_nested:
            raise RuntimeError("`nn.MultiheadAttention` with adapters takes no nested tensors")
        batched, samples = query.dim() == 3, self._samples()
        if samples > 1 and not batched:
            message = "attention gets one sample without a batch, of a batch of several"
            help = "give the model batches of one sample each"
            raise LoraFxError((Diagnostic("rows-not-samples", message, help=help),))
        turned = batched and not self.batch_first
        first = not turned or samples > 0
        if not batched or (turned and first):
            query, key, value = _each_once(query, key, value, turned)
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        q, k, v = (_heads(x, self.num_heads, first) for x in self._projected(query, key, value))
        (N, H, L, _), S = q.shape, k.shape[2]
        masks = Masks(key_padding_mask, attn_mask, is_causal).checked(N, H, L, S)
        k, v = (self._extended(x, own) for x, own in ((k, self.bias_k), (v, self.bias_v)))
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(q, k, v, masks, dropout, k.shape[2] - S, need_weights)
        output = output.permute((0, 2, 1, 3) if first else (2, 0, 1, 3)).flatten(2)
        output = self.out_proj(output)
        if turned and first:
            output = output.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            output, weights = output[0], None if weights is None else weights[0]
        return output, weights

    def _sites(self) -> list[Site]:
        own = self._modules[SITES]
        return [*own.values(), *([self.out_proj] if isinstance(self.out_proj, Site) else [])]  # type: ignore[union-attr, misc]

    def _samples(self) -> int:
        """Return the number of samples of a mixed batch, 0 in any other call."""
        for site in self._sites():
            shares = None if site.lora_routing is None else site.lora_routing.shares
            if isinstance(shares, Tensor):
                return len(shares)
        return 0

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        E, bias = self.embed_dim, self.in_proj_bias
        if self._parameters[PACKED] is None:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            given = zip(SEPARATE, (query, key, value), biases, strict=True)
            return tuple(self._project(name, x, own, None) for name, x, own in given)
        if query is key and key is value:
            return self._project(PACKED, query, bias, None).chunk(3, -1)
        if key is value:
            parts = ((query, slice(E)), (key, slice(E, 3 * E)))
        else:
            parts = (query, slice(E)), (key, slice(E, 2 * E)), (value, slice(2 * E, 3 * E))
        projected = [
            self._project(PACKED, x, None if bias is None else bias[rows], rows)
            for x, rows in parts
        ]
        return (projected[0], *projected[1].chunk(2, -1)) if key is value else tuple(projected)

    def _project(self, name: str, x: Tensor, bias: Tensor | None, rows: slice | None) -> Tensor:
        own: Any = self._modules[SITES]
        if name in own:
            return own[name].project(x, bias, rows)
        weight = self._parameters[name]
        assert weight is not None
        return F.linear(x, weight if rows is None else weight[rows], bias)

    def _extended(self, x: Tensor, own: Tensor | None) -> Tensor:
        """Append the key or value (1, 1, E) of the module's own, and zeros, if it has them."""
        N, H, _, D = x.shape
        parts = [x] if own is None else [x, own.view(1, H, 1, D).expand(N, -1, -1, -1)]
        if self.add_zero_attn:
            parts.append(x.new_zeros(N, H, 1, D))
        return torch.cat(parts, 2) if len(parts) > 1 else x


def is_projection(module: nn.Module, name: str) -> bool:
    """Whether a parameter is an input projection of an attention that can be marked."""
    layer = layer_of(module)
    return layer is not None and layer.kind == "attention" and name in (PACKED, *SEPARATE)


def mark_projection(attention: nn.Module, name: str) -> ProjectionSite:
    """Make an input projection a site without adapters, in place. A site is returned as it is."""
    site = mark_parameter(attention, name, ProjectionSite)
    if not isinstance(attention, AttentionSite):
        specialise(attention, AttentionSite)
    assert isinstance(site, ProjectionSite)
    return site


def _each_once(query: Tensor, key: Tensor, value: Tensor, turned: bool) -> tuple[Tensor, ...]:
    """Return the inputs with the samples first; what was one tensor stays one."""
    q = query.transpose(0, 1) if turned else query[None]
    k = q if key is query else (key.transpose(0, 1) if turned else key[None])
    if value is query or value is key:
        return q, k, q if value is query else k
    return q, k, value.transpose(0, 1) if turned else value[None]


def _heads(x: Tensor, heads: int, first: bool) -> Tensor:
    """Return (N, L, E), or (L, N, E), as (N, heads, L, D)."""
    x = x.unflatten(-1, (heads, -1))
    return x.transpose(1, 2) if first else x.permute(1, 2, 0, 3)
