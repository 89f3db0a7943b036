"""From which token on adapters act that wait for their invocation: aLoRA, arXiv 2504.12397.

An adapter acts from the start of the last occurrence of its tokens in a sample on; in a sample
without them it does not act. Before that start every hidden state, and so what a cache holds of it,
is the base's. Places are counted from the first token that the cache holds, or the call has. The
tokens are looked for where they are, and nothing of that is read back from a device.

In `generate` the prompt decides, once. Other calls that go on with a cache go on as it was left: a
cache notes where the adapters began, and the tokens of the call decide where they begin in it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lora_fx.adapters.sites.site import Site
from lora_fx.diagnostics import Diagnostic, LoraFxError

STARTS = "invocation_starts"
_NEVER = 1 << 40  # no sample is as long
_NOTED = "lora_fx_starts"
_IDS, _MASK, _EMBEDDED = "input_ids", "attention_mask", "inputs_embeds"
Tokens = tuple[int, ...] | None


class Invocations:
    """Where the adapters of one call begin: `starts` (S, adapters), int64; None if none waits."""

    def __init__(self, waiting: Mapping[str, Tokens], starts: Tensor | None) -> None:
        self._waiting = waiting
        self.starts = starts
        self.invoked: Tensor | None = None

    def note(self, result: Any) -> None:
        """Note in the caches of a result where they began."""
        if self.starts is None:
            return
        columns = {name: self.starts[:, i] for i, name in enumerate(self._waiting)}
        found = {name: columns[name] for name, tokens in self._waiting.items() if tokens}
        for cache in _caches(result.values() if isinstance(result, Mapping) else result):
            setattr(cache, _NOTED, {**getattr(cache, _NOTED, {}), **found})


def in_call(
    model: Any,
    routed: bool,
    needed: Callable[[], set[str]],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Invocations:
    """Look for the invocations in a call of `forward`, whose keyword `STARTS` is taken out of it.

    `routed` says that each sample has its own adapters, and `needed` which of them there are. Sets
    `invoked` (S, adapters), int64, as `Routing` describes it. Raises LoraFxError where there are no
    tokens to look for.
    """
    given = kwargs.pop(STARTS, None)
    waiting = waiting_of(model, routed)
    if not any(waiting.values()):
        return Invocations(waiting, None)
    said = _arguments(forward, args, kwargs)
    ids, cache = said.get(_IDS), next(_caches(said.values()), None)
    tokens = ids if isinstance(ids, Tensor) else said.get(_EMBEDDED)
    if tokens is None or (given is None and tokens is not ids):
        there = needed()
        if any(there & {name} for name, one in waiting.items() if one):
            raise _no_tokens(waiting)
        return Invocations({}, None) if tokens is None else _nowhere(waiting, tokens)
    _require_in_order(model, waiting, said)
    past: int | Tensor = 0 if cache is None else _length(cache)
    starts = given
    if starts is None:
        noted = getattr(cache, _NOTED, {})
        columns = [
            _start(tokens, said.get(_MASK), one, past, noted.get(name))
            for name, one in waiting.items()
        ]
        starts = torch.stack(columns, 1)
    found = Invocations(waiting, starts.to(tokens.device))
    found.invoked = past + tokens.shape[1] - found.starts  # type: ignore[operator]
    return found


def in_prompt(
    model: Any,
    routed: bool,
    needed: Callable[[], set[str]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor | None:
    """Return where the adapters begin in the prompts of `generate` (S, adapters), or None."""
    waiting = waiting_of(model, routed)
    if kwargs.get(STARTS) is not None or not any(waiting.values()):
        return None
    ids = next((kwargs[n] for n in (_IDS, "inputs") if kwargs.get(n) is not None), None)
    ids = args[0] if ids is None and args else ids
    if not isinstance(ids, Tensor) or kwargs.get(_EMBEDDED) is not None:
        there = needed()
        if any(there & {name} for name, one in waiting.items() if one):
            raise _no_tokens(waiting)
        return None
    columns = [_start(ids, kwargs.get(_MASK), one, 0, None) for one in waiting.values()]
    return torch.stack(columns, 1)


def waiting_of(model: Any, routed: bool) -> dict[str, Tokens]:
    """Return the adapters of a call in the order of their columns, and the tokens they wait for."""
    if routed:
        names: Sequence[str] = model.lora_fx_routes.adapters
    else:
        on = model.lora_fx_active if model.lora_fx_enabled else ()
        names = [name for name in on if name not in model.lora_fx_merged]
    return {name: model.lora_fx_invocations.get(name) for name in names}


def _start(
    ids: Tensor, mask: Any, tokens: Tokens, past: int | Tensor, noted: Tensor | None
) -> Tensor:
    """Return where one adapter begins in each sample (S,); padded tokens are none of its own."""
    samples, length = ids.shape
    never = torch.full((samples,), _NEVER, device=ids.device)
    if noted is not None:
        if len(noted) != samples:
            raise _other_samples(len(noted), samples)
        noted = noted.to(ids.device)
        never = torch.where(noted < past, noted, never)  # what was begun and is still held
    if not tokens or length < len(tokens):
        return never
    sought = torch.tensor(tokens, device=ids.device)
    hits = (ids.unfold(1, len(tokens), 1) == sought).all(-1)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
        hits = hits & mask[:, -length:].bool().unfold(1, len(tokens), 1).all(-1)
    places = torch.arange(hits.shape[1], device=ids.device)
    last = torch.where(hits, places, -1).amax(1)
    return torch.where(last < 0, never, past + last)


def _require_in_order(model: Any, waiting: Mapping[str, Tokens], said: Mapping[str, Any]) -> None:
    """Raise LoraFxError if an adapted output head gets some tokens of its own choice."""
    chosen = isinstance(said.get("logits_to_keep"), Tensor)
    head = model.get_output_embeddings() if chosen else None
    if isinstance(head, Site) and any(waiting.get(name) for name in head.lora_arithmetic):
        message = "the adapted output head would not know which tokens `logits_to_keep` chooses"
        help = "give a number: that many of the last tokens"
        raise LoraFxError((Diagnostic("not-invocable", message, help=help),))


def _nowhere(waiting: Mapping[str, Tokens], tokens: Tensor) -> Invocations:
    found = Invocations(waiting, None)
    found.invoked = tokens.new_zeros((len(tokens), len(waiting)), dtype=torch.int64)
    return found


def _length(cache: Cache) -> int | Tensor:
    try:
        return cache.get_seq_length()
    except ValueError as error:
        message = f"a `{type(cache).__name__}` does not say how many tokens it has seen"
        help = "call the model with the whole text, `use_cache=False`"
        raise LoraFxError((Diagnostic("not-invocable", message, help=help),)) from error


def _caches(values: Any) -> Iterator[Cache]:
    if isinstance(values, Cache):
        yield values
    elif not isinstance(values, Tensor | str) and hasattr(values, "__iter__"):
        yield from (value for value in values if isinstance(value, Cache))


def _arguments(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    names = _parameters(getattr(forward, "__func__", forward))
    return {**dict(zip(names[1:], args, strict=False)), **kwargs}


@lru_cache
def _parameters(forward: Any) -> list[str]:
    return list(inspect.signature(forward).parameters)


def _no_tokens(waiting: Mapping[str, Tokens]) -> LoraFxError:
    name = next(name for name, tokens in waiting.items() if tokens)
    message = f"`{name}` acts from its invocation tokens on, and the call has no `input_ids`"
    help = "give the tokens, or call the model with another adapter: `set_adapter`"
    return LoraFxError((Diagnostic("not-invocable", message, help=help),))


def _other_samples(noted: int, samples: int) -> LoraFxError:
    message = f"a cache of {noted} samples goes on with {samples}"
    help = "call the model with the whole text of each sample"
    return LoraFxError((Diagnostic("not-invocable", message, help=help),))
