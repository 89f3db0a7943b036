"""Which adapters each sample of the running call gets, and from which of its tokens on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from lora_fx.adapters.result_tensors import result_tensors
from lora_fx.adapters.weights import copies
from lora_fx.diagnostics import Diagnostic, LoraFxError

_COUNTING = Lock()
_CHECKPOINT = "_gradient_checkpointing_func"  # transformers keeps it in every layer
Shares = Tensor | tuple[()]


class Routing:
    """One for all the modules of a model; `shares` is None where all samples get the same.

    `shares` (S, adapters), float32, are the parts that each adapter has in each sample; `()` says
    that no sample has any, and every module computes what the base does. While there are shares,
    `versioned` modules have the base's tensors in force. `is_base_whole`: no adapter has taken
    anything out of the weights that would have to be added for the base. `invoked` (S, adapters),
    int64, is on how many of the last tokens of each sample an adapter acts that acts from its
    invocation on; without shares its columns are the active adapters. It is None if there is none.
    `in_force` are the adapters that act without shares, then those that are merged.
    """

    is_base_whole: bool = True

    def __init__(self) -> None:
        self.shares: Shares | None = None
        self.invoked: Tensor | None = None
        self.in_force: tuple[tuple[str, ...], tuple[str, ...]] = (), ()
        self.versioned: tuple[nn.Module, ...] = ()
        self._aside: list[tuple[nn.Module, dict[str, Tensor]]] = []
        self._running: list[int] = []  # the thread of each call

    @property
    def is_running(self) -> bool:
        """Whether a call of the model runs, in any thread."""
        return bool(self._running)

    @property
    def mixes(self) -> bool:
        """Whether samples of the running call can have adapters of their own."""
        return isinstance(self.shares, Tensor)

    @contextmanager
    def of(self, shares: Shares | None, invoked: Tensor | None = None) -> Iterator[None]:
        """Route a call; whatever happens in it, afterwards everything is as it was.

        Raises LoraFxError beside a call in another thread, if either is of a mixed batch, or of
        adapters that wait for their invocation.
        """
        thread = get_ident()
        with _COUNTING:
            beside = any(other != thread for other in self._running)
            own = shares, invoked, self.shares, self.invoked
            if beside and any(tensor is not None for tensor in own):
                is_mixed = shares is not None or self.shares is not None
                what = "a mixed batch" if is_mixed else "an aLoRA"
                message = f"{what} runs beside another call of this model, in another thread"
                help = "let one wait for the other, or give each thread its own copy of the model"
                raise LoraFxError((Diagnostic("bad-routing", message, help=help),))
            if not self._running:  # a backward pass that failed may have left its own
                self._set(None, None)
            self._running.append(thread)
        before = self.shares, self.invoked
        try:
            self._set(shares, invoked)
            yield
        finally:
            self._set(*before)
            self._running.remove(thread)

    @property
    def shares_around(self) -> Shares | None:
        """The shares of the call that is running, None between calls."""
        return self.shares if self._running else None

    def again(self, result: Any) -> None:
        """Route what a backward pass through a result computes again as the call that runs is.

        What checkpoints by itself calls parts of the model then, after the call has ended.
        """
        shares, invoked = self.shares, self.invoked
        if shares is None and invoked is None:
            return

        def begins(_: Tensor) -> None:
            if not self._running and (self.shares is not shares or self.invoked is not invoked):
                self._set(shares, invoked)
                Variable._execution_engine.queue_callback(self._forget)

        for tensor in result_tensors(result):
            if tensor.requires_grad:
                tensor.register_hook(begins)

    def _forget(self) -> None:
        if not self._running:
            self._set(None, None)

    def settle(self) -> None:
        """Let the base's tensors be in force again, if others have been put there meanwhile."""
        if self.shares is not None:
            self._put_base()

    def _set(self, shares: Shares | None, invoked: Tensor | None) -> None:
        before, self.shares, self.invoked = self.shares, shares, invoked
        if before is None and shares is not None:
            self._put_base()
        elif before is not None and shares is None:
            for module, own in self._aside:
                copies.put(module, own)
            self._aside = []

    def _put_base(self) -> None:
        self._aside = [(module, copies.in_force(module)) for module in self.versioned]
        for module in self.versioned:
            copies.put(module, copies.tensors(module, copies.BASE))


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
    """Call `checkpoint(function, …)`; what it computes again is routed as it was the first time.

    Raises LoraFxError there if other adapters act by then, in a call that is not of a mixed batch.
    """
    if torch.compiler.is_compiling():  # the graph holds both
        return checkpoint(function, *args, **kwargs)
    shares, invoked, in_force = routing.shares, routing.invoked, routing.in_force

    def routed(*args: Any, **kwargs: Any) -> Any:
        if shares is None and routing.in_force != in_force:
            message = "other adapters act than when what is computed again was computed"
            help = "call `backward()` before `set_adapter`, `disable_adapter` or a merge"
            raise LoraFxError((Diagnostic("bad-routing", message, help=help),))
        with routing.of(shares, invoked):
            return function(*args, **kwargs)

    return checkpoint(routed, *args, **kwargs)


def _is_carrying(function: Any) -> bool:
    return getattr(function, "func", None) is checkpoint_routed
