"""A unit of compilation: one `torch.compile` entry that serves every layer alike.

Relies on private names of torch: the errors by which `fullgraph=True` reports that something cannot
be captured, that a backend failed, and that the recompile limit was hit; `test_not_capturable` and
`test_beyond_the_limit_it_fails_aloud` hold them.
"""

import inspect
import itertools
import logging
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    TorchDynamoException,
)

from lora_fx.adapters.dynamic_class import specialise
from lora_fx.adapters.routing import Routing, Shares
from lora_fx.adapters.sites.adapted_weight import let_dynamo_ask
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph.meta import PlainText
from lora_fx.runtime.units.cache_view import LayerCache, LayerCaches, with_views
from lora_fx.runtime.units.kept_guards import kept_guards
from lora_fx.runtime.units.not_capturable import not_capturable
from lora_fx.runtime.units.plain_arguments import note_plain, with_plain
from lora_fx.runtime.units.recorded_outputs import inner_outputs_wanted, place_hooks, unrecorded
from lora_fx.runtime.units.uncalled import unwatched
from lora_fx.runtime.units.window_lengths import compare, windows_of

Backend = Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]
GuardFilter = Callable[[Sequence[Any]], Sequence[bool]]
GRAPHS_PER_UNIT = 200  # twenty kinds of calls for each set of places and ranks; torch has 256
_numbers = itertools.count()


class Unit:
    """Compiles the own `forward` of the modules that share it.

    Graphs take weights as inputs, so modules of equal structure share them. A unit has its own
    code object under its own name, and with it its own cache entries, recompile limit and memory
    of which sizes change: the models of one process do not use up each other's. Beyond
    `GRAPHS_PER_UNIT` graphs it fails rather than run uncompiled. Copies and pickles compile anew.
    """

    def __init__(self, backend: Backend, dynamic: bool | None) -> None:
        self.backend = backend
        self.dynamic = dynamic
        self._compiled: Any = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `module`'s original forward, compiled."""
        if self._compiled is None:
            self._compiled = self.entry()
        try:
            return self._compiled(module, args, kwargs)
        except FailOnRecompileLimitHit as error:
            message = f"`{type(module).__name__}` needs more than {GRAPHS_PER_UNIT} graphs"
            help = "find what differs between calls with TORCH_LOGS=recompiles"
            raise LoraFxError((Diagnostic("too-many-graphs", message, help=help),)) from error
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, LoraFxError):
                raise error.inner_exception from None
            raise
        except TorchDynamoException as error:
            own = _raised_by_an_operator(error)
            if own is not None:
                raise own from None
            raise not_capturable(module, error) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def entry(self, kept: GuardFilter = kept_guards) -> Any:
        """Return a `torch.compile` entry of (module, args, kwargs), with its own code object."""
        limits: dict[str, Any] = {}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            limits = {"recompile_limit": GRAPHS_PER_UNIT, "isolate_recompiles": True}
        else:  # torch 2.11 has only the limit of the process
            config = torch.compiler.config
            config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_UNIT)
        _let_models_warn()
        let_dynamo_ask()
        code = _forward.__code__.replace(co_name=f"forward_{next(_numbers)}")
        entry = types.FunctionType(code, _forward.__globals__)
        return torch.compile(
            entry,
            backend=self.backend,
            fullgraph=True,
            dynamic=self.dynamic,
            options={"guard_filter_fn": kept},  # type: ignore[dict-item]
            **limits,
        )


def _raised_by_an_operator(error: BaseException | None) -> LoraFxError | None:
    """Return the error of ours that Dynamo met when it ran an operator on fakes."""
    while error is not None and not isinstance(error, LoraFxError):
        error = error.__cause__ or error.__context__
    return error


def _let_models_warn() -> None:
    """Leave out of graphs what transformers logs once, instead of refusing models that do."""
    once = (getattr(logging.Logger, name, None) for name in ("warning_once", "info_once"))
    ignored = torch._dynamo.config.ignore_logger_methods
    torch._dynamo.config.ignore_logger_methods = {*ignored, *map(_Method, filter(None, once))}


class _Method(str):
    """A method in a set that torch 2.11 wants to sort and log as text; equal to the method."""

    method: Callable[..., Any]

    def __new__(cls, method: Callable[..., Any]) -> "_Method":
        self = super().__new__(cls, method.__qualname__)
        self.method = method
        return self

    def __eq__(self, other: object) -> bool:
        return getattr(other, "method", other) is self.method

    def __hash__(self) -> int:
        return hash(self.method)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Method, (self.method,)


def _forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = with_plain(args, kwargs)
    if _SHARES in kwargs:
        kwargs = dict(kwargs)
        module.lora_routing.shares = kwargs.pop(_SHARES)  # type: ignore[union-attr]
    if _INVOKED in kwargs:
        kwargs = dict(kwargs)
        module.lora_routing.invoked = kwargs.pop(_INVOKED)  # type: ignore[union-attr]
    compare(module.lora_fx_windows, args, kwargs)  # type: ignore[arg-type]
    return super(Compiled, module).forward(*args, **kwargs)  # type: ignore[misc]


_SHARES = "lora_fx_shares"
_INVOKED = "lora_fx_invoked"
_OUTER = (
    "lora_fx has compiled this model itself: leave out the torch.compile around it "
    "(`torch.compile(model)`, `torch_compile=True` of Trainer)"
)


class Compiled:
    """Mixin: `forward` runs in a unit; hooks and eager activation checkpointing stay outside.

    `lora_fx_index` is the layer's place in the key/value cache, None for a whole model, which
    alone has `lora_fx_windows`, the lengths of its attention windows.
    """

    lora_fx_unit: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
    lora_fx_index: int | None
    lora_fx_windows: tuple[int, ...]
    lora_routing: Routing | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, compiled; a layer gets its own slice of the cache."""
        if torch.compiler.is_compiling():
            _warn_of_outer_compile()
        return _enter(self, args, kwargs)


@torch.compiler.disable(reason=_OUTER)
def _enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    views: list[LayerCache | LayerCaches] = []
    if module.lora_fx_index is not None:
        args, kwargs, views = with_views(args, kwargs, module.lora_fx_index)
        kwargs.pop("num_items_in_batch", None)  # Trainer's, for the loss; layers ignore it
    routing = module.lora_routing
    if routing is not None and routing.shares is not None:
        kwargs = {**kwargs, _SHARES: routing.shares}  # an input of the graph
    if routing is not None and routing.invoked is not None:
        kwargs = {**kwargs, _INVOKED: routing.invoked}
    if inner_outputs_wanted(module.lora_fx_index is None, kwargs):
        result = _forward(module, args, kwargs)
    else:
        if module.lora_fx_index is None:
            own: Any = super(Compiled, module)
            kwargs = note_plain(own.forward, args, kwargs)
        with unrecorded(), unwatched():
            result = module.lora_fx_unit(module, args, kwargs)
    for one in views:
        one.write_back()
    return result


@torch.compiler.disable(reason=_OUTER)
def _warn_of_outer_compile() -> None:
    warnings.warn(_OUTER, stacklevel=2)


class _Reached(Exception):
    """Carries the arguments of the call that was waited for."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


def arguments_of(
    wanted: Compiled, units: list[Compiled], run: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Call `run`, nothing compiled, and return what `wanted` is called with; it goes no further."""

    def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module is wanted:
            raise _Reached(args, kwargs)
        return _forward(module, args, kwargs)

    before = [unit.lora_fx_unit for unit in units]
    for unit in units:
        unit.lora_fx_unit = reached
    try:
        with PlainText():
            run()
    except _Reached as call:
        return call.args, call.kwargs
    finally:
        for unit, own in zip(units, before, strict=True):
            unit.lora_fx_unit = own
    raise AssertionError("the model did not call the layer")


def routed_by(kwargs: dict[str, Any]) -> tuple[Shares | None, Tensor | None]:
    """Return the shares and the invocations in the arguments of a unit."""
    return kwargs.get(_SHARES), kwargs.get(_INVOKED)


def install_unit(module: nn.Module, unit: Unit, index: int | None) -> None:
    """Make `module` run in `unit`, in place."""
    specialise(module, Compiled)
    if index is None:
        place_hooks(module)
    module.lora_fx_unit = unit  # type: ignore[assignment]
    module.lora_fx_index = index  # type: ignore[assignment]
    module.lora_fx_windows = windows_of(module) if index is None else ()  # type: ignore[assignment]
