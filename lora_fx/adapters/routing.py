"""Which adapters each sample of the running call gets, and from which of its tokens on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.diagnostics import Diagnostic, LoraFxError

_COUNTING = Lock()
_CHECKPOINT = "_gradient_checkpointing_func"  # transformers keeps it in every layer


class Routing:
    """One for all the modules of a model; `shares` is None where all samples get the same.

    `shares` (S, adapters), float32, are the parts that each adapter has in each sample. `invoked`
    (S, adapters), int64, is on how many of the last tokens of each sample an adapter acts that acts
    from its invocation on; without shares its columns are the active adapters. It is None if there
    is none such.
    """

    def __init__(self) -> None:
        self.shares: Tensor | None = None
        self.invoked: Tensor | None = None
        self._running: list[int] = []  # the thread of each call

    @contextmanager
    def of(self, shares: Tensor | None, invoked: Tensor | None = None) -> Iterator[None]:
        """Route a call; whatever happens in it, afterwards everything is as it was.

        Raises LoraFxError beside a call in another thread, if either is of a mixed batch, or of
        adapters that wait for their invocation.
        """
        thread = get_ident()
        with _COUNTING:
            beside = any(other != thread for other in self._running)
            own = shares, invoked, self.shares, self.invoked
            if beside and any(tensor is not None for tensor in own):
                what = "a mixed batch" if (shares, self.shares) != (None, None) else "an aLoRA"
                message = f"{what} runs beside another call of this model, in another thread"
                help = "let one wait for the other, or give each thread its own copy of the model"
                raise LoraFxError((Diagnostic("bad-routing", message, help=help),))
            self._running.append(thread)
        before = self.shares, self.invoked
        self.shares, self.invoked = shares, invoked
        try:
            yield
        finally:
            self.shares, self.invoked = before
            self._running.remove(thread)


def carry(module: nn.Module, routing: Routing) -> None:
    """Let the activation checkpointing of a module compute again what it computed, in place."""
    function = vars(module).get(_CHECKPOINT)
    if function is not None and not _is_carrying(function):
        vars(module)[_CHECKPOINT] = partial(checkpoint_routed, routing, function)


def unrouted(module: nn.Module) -> None:
    """Undo `carry`, in place."""
    function = vars(module).get(_CHECKPOINT)
    if isinstance(function, partial) and _is_carrying(function):
        vars(module)[_CHECKPOINT] = function.args[1]


def checkpoint_routed(
    routing: Routing,
    checkpoint: Callable[..., Any],
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call `checkpoint(function, …)`; what it computes again is routed as it was the first time."""
    if torch.compiler.is_compiling():  # the graph holds both
        return checkpoint(function, *args, **kwargs)
    shares, invoked = routing.shares, routing.invoked

    def routed(*args: Any, **kwargs: Any) -> Any:
        with routing.of(shares, invoked):
            return function(*args, **kwargs)

    return checkpoint(routed, *args, **kwargs)


def _is_carrying(function: Any) -> bool:
    return getattr(function, "func", None) is checkpoint_routed
