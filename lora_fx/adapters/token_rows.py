"""Rows of an embedding that an adapter trains, and the outputs of a head that shares its weight."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.dynamic_class import specialise
from lora_fx.adapters.routing import Routing
from lora_fx.adapters.sites.layer import output_scale
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights.own_outputs import OwnOutputs
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph import ops
from lora_fx.plan.modules import outside_adapters
from lora_fx.plan.offloaded import device_of, values_of

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class Rows(nn.Module):
    """One adapter's rows: `weight` (n, width) for the `tokens` (n,), int64.

    `padding` is the number of the row that an embedding never learns, None if it is not among them.
    """

    tokens: Tensor

    def __init__(
        self, ids: tuple[int, ...], weight: Tensor, padding: int | None, trainable: bool
    ) -> None:
        super().__init__()
        self.ids = ids
        self.padding = ids.index(padding) if padding in ids else None
        self.weight = nn.Parameter(weight, requires_grad=trainable)
        self._place_tokens()

    def _place_tokens(self) -> None:
        tokens = torch.tensor(self.ids, dtype=torch.int64, device=self.weight.device)
        self.register_buffer("tokens", tokens, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._place_tokens()
        return self


class TokenRows(_Base):
    """Mixin for an embedding, or a linear head that shares its weight, with rows of its own.

    Active adapters' rows stand in the place of the base weight's: an embedding gives them for
    their ids, a head computes the logits of their ids from them. In a mixed batch each sample has
    those of its adapter.
    """

    lora_tokens: nn.ModuleDict
    lora_active_tokens: tuple[Rows, ...]
    lora_mixed_tokens: tuple[tuple[int, Rows], ...] = ()
    lora_routing: Routing | None = None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base module and put each active adapter's rows in place."""
        output = super().forward(input, *args, **kwargs)
        shares = None if self.lora_routing is None else self.lora_routing.shares
        if isinstance(shares, Tensor):
            return self._mixed(output, input, shares.to(output.device))
        if shares is not None:
            return output
        for rows in self.lora_active_tokens:
            if isinstance(self, nn.Embedding):
                own = rows.weight * output_scale(self)
                output = ops.replace_rows(output, input, rows.tokens, own, rows.padding)
            else:
                bias = self.bias
                output = ops.replace_columns(output, input, rows.tokens, rows.weight, bias)
        return output

    def _mixed(self, base: Tensor, input: Tensor, shares: Tensor) -> Tensor:
        """Put the rows of every adapter in place, each in its own samples."""
        output = base
        for column, rows in self.lora_mixed_tokens:
            if isinstance(self, nn.Embedding):
                own = rows.weight * output_scale(self)
                how = rows.tokens, own, rows.padding, shares, column
                output = ops.mix_rows(output, base, input, *how)
            else:
                how = rows.tokens, rows.weight, self.bias, shares, column
                output = ops.mix_columns(output, base, input, *how)
        return output


def add(module: nn.Embedding, adapter: str, ids: tuple[int, ...], trainable: bool) -> Rows:
    """Give an adapter rows of its own, with the base's values. Not active until `activate`.

    They are float32, or of the base's dtype if that is wider.
    """
    whole = values_of(module, "weight", module.weight)
    dtype = torch.promote_types(whole.dtype, torch.float32)
    values = whole[list(ids)].to(device_of(module, module.weight), dtype)
    rows = Rows(ids, values, module.padding_idx, trainable).train(module.training)
    share(module, adapter, rows)
    return rows


def share(module: nn.Module, adapter: str, rows: Rows) -> None:
    """Let a module use an adapter's rows: the embedding, and the head tied to it."""
    if not isinstance(module, TokenRows):
        specialise(module, TokenRows, beneath=(Site, OwnOutputs))
        module.lora_tokens = nn.ModuleDict().train(module.training)
        module.lora_active_tokens = ()  # type: ignore[assignment]
    module.lora_tokens[adapter] = rows  # type: ignore[index, operator]


def holders(model: nn.Module) -> Iterator[tuple[str, TokenRows]]:
    """Yield every module that has rows, with its fqn."""
    for fqn, module in outside_adapters(model):
        if isinstance(module, TokenRows):
            yield fqn, module


def route(model: nn.Module, adapters: tuple[str, ...], routing: Routing) -> None:
    """Say which adapter each column of the shares of a mixed batch is of."""
    for _, module in holders(model):
        module.lora_routing = routing
        own = ((column, name) for column, name in enumerate(adapters) if name in module.lora_tokens)
        module.lora_mixed_tokens = tuple((c, module.lora_tokens[n]) for c, n in own)  # type: ignore[misc]


def remove(module: TokenRows, adapter: str) -> None:
    """Delete an adapter's rows; they must not be active."""
    del module.lora_tokens[adapter]


def require_distinct(model: nn.Module, adapters: tuple[str, ...]) -> None:
    """Raise LoraFxError if two of these adapters train the same row."""
    for fqn, module in holders(model):
        found: dict[int, str] = {}
        for adapter in adapters:
            for token in (t for rows in rows_of(module, adapter) for t in rows.ids):
                other = found.setdefault(token, adapter)
                if other != adapter:
                    message = f"`{other}` and `{adapter}` both train row {token} of `{fqn}`"
                    help = "activate one of them at a time"
                    raise LoraFxError((Diagnostic("adapter-conflict", message, help=help),))


def rows_of(module: nn.Module, adapter: str) -> list[Rows]:
    """Return an adapter's rows at a module; none if it has none there."""
    if not isinstance(module, TokenRows) or adapter not in module.lora_tokens:
        return []
    return [module.lora_tokens[adapter]]  # type: ignore[list-item]


def activate(model: nn.Module, adapters: tuple[str, ...]) -> None:
    """Let the rows of exactly these adapters stand in for the base's."""
    for _, module in holders(model):
        present = (name for name in adapters if name in module.lora_tokens)
        module.lora_active_tokens = tuple(module.lora_tokens[n] for n in present)  # type: ignore[misc]
