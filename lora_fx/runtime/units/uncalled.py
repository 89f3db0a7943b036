"""Find weights that the model reads without calling the adapted module that they belong to.

`F.linear(x, self.proj.weight)` passes an adapter on `proj` by: it would be trained by nobody and
do nothing. Compiled units are looked at when they are captured, and what runs outside them when
the model runs for the first time with these adapters, in training and in evaluation: there torch's
encoder layers read all weights themselves.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from lora_fx.adapters import storage
from lora_fx.adapters.sites.convolution_site import ConvolutionSite
from lora_fx.adapters.weights import copies
from lora_fx.adapters.weights.own_outputs import OwnOutputs, of_model
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph import ops
from lora_fx.graph.inputs import named_input
from lora_fx.graph.text import FQN
from lora_fx.rewrite.driver import graph_modules
from lora_fx.runtime.units.model_source import Place, caller, innermost_of_trace, span_of

_watch: ContextVar["_Watch | None"] = ContextVar("watch", default=None)


def require_called(module: GraphModule, inputs: Sequence[Any], model: nn.Module) -> None:
    """Raise LoraFxError if a captured graph reads the weight of an active site and has no site."""
    owners = _owners(_active_sites(model))
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    used = {
        id(value): innermost_of_trace(next(iter(placeholder.users)).stack_trace or "")
        for placeholder, value in zip(placeholders, inputs, strict=True)
        if id(value) in owners and placeholder.users
    }
    called = {
        node.meta[FQN].partition(".lora_")[0]
        for part in graph_modules(module)
        for site in part.graph.nodes
        if site.target is ops.site
        for node in map(named_input, site.args[2])  # type: ignore[arg-type]
        if FQN in node.meta
    }
    called |= {
        placeholder.meta[FQN].partition(".lora_own.")[0]
        for placeholder in placeholders
        if ".lora_own." in placeholder.meta.get(FQN, "") and placeholder.users
    }
    _refuse(used, owners, called)


def run_watched(
    model: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a model, and look on if its active adapters have not been seen to run in this mode.

    Raises LoraFxError, once the model has run, for a site whose weight was read and that was not
    called.
    """
    active = model.lora_fx_active if model.lora_fx_enabled else ()
    routing = model.lora_fx_routing
    if routing.shares is not None:
        active = ("__mixed__", *model._watched()) if routing.mixes else ()
    seen = active, model.training
    if torch.compiler.is_compiling() or not active or seen in model.lora_fx_watched:
        return forward(*args, **kwargs)
    watch = _Watch(_outside_units(model))
    token = _watch.set(watch)
    try:
        with watch, watch.hooks():
            result = forward(*args, **kwargs)
    finally:
        _watch.reset(token)
    watch.require_called()
    model.lora_fx_watched.add(seen)
    return result


@contextmanager
def unwatched() -> Iterator[None]:
    """Let a compiled unit run as if nobody looked on."""
    watch = _watch.get()
    if watch is None:
        yield
        return
    watch.__exit__(None, None, None)
    try:
        yield
    finally:
        watch.__enter__()


class _Watch(TorchFunctionMode):
    """Notes which weights are read, and which sites are called."""

    def __init__(self, sites: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._sites = sites
        self._owners = _owners(sites)
        self._convolutions = {
            id(site.lora_branches[name].A.weight): fqn
            for fqn, site in sites.items()
            if isinstance(site, ConvolutionSite)
            for name in site.lora_branches
        }
        self._used: dict[int, Place | None] = {}
        self._called: set[str] = set()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is ops.site:
            announced = self._convolutions.keys() & {id(tensor) for tensor in args[2]}
            self._called |= {self._convolutions[tensor] for tensor in announced}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            for value in _flat((*args, *(kwargs or {}).values())):
                if id(value) in self._owners and id(value) not in self._used:
                    self._used[id(value)] = caller(sys._getframe())
        return result

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Have each site say when it is called; convolutions announce themselves later."""
        hooks = [
            site.register_forward_pre_hook(lambda *_, fqn=fqn: self._called.add(fqn))
            for fqn, site in self._sites.items()
            if not isinstance(site, ConvolutionSite)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def require_called(self) -> None:
        """Raise LoraFxError for sites whose weight was read and that were not called."""
        _refuse(self._used, self._owners, self._called)


def _active_sites(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that adapters adapt, and in a mixed batch those that they train.

    A parameter is adapted wherever it is read.
    """
    active = {fqn: site for fqn, site in storage.sites(model) if site.takes_part}
    sites = {fqn: site for fqn, site in active.items() if site.lora_place[0] is site}
    return {**sites, **{fqn: module for fqn, module in of_model(model) if module.mixes}}


def _outside_units(model: nn.Module) -> dict[str, nn.Module]:
    units = [fqn for fqn, module in model.named_modules() if hasattr(module, "lora_fx_unit")]
    inside = tuple(f"{fqn}." if fqn else "" for fqn in units)
    return {f: site for f, site in _active_sites(model).items() if not f.startswith(inside)}


def _owners(sites: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Return the names of the sites that have a weight; several do where it is shared."""
    owners: dict[int, list[str]] = {}
    for fqn, site in sites.items():
        mixes = isinstance(site, OwnOutputs) and site.mixes
        tensors = copies.tensors(site, copies.BASE).values() if mixes else (site.weight,)
        for tensor in tensors:
            owners.setdefault(id(tensor), []).append(fqn)
    return owners


def _refuse(
    used: Mapping[int, Place | None], owners: Mapping[int, list[str]], called: set[str]
) -> None:
    faults = [
        Diagnostic(
            "site-never-called",
            f"`{owners[weight][0]}` is adapted, and the model reads its weight without calling it",
            span_of(place),
            "reads the weight, which has no adapter in it",
            help=f'write `except "{owners[weight][0]}"`, and to adapt what is read '
            f'`target parameter "{owners[weight][0]}.weight"`',
        )
        for weight, place in used.items()
        if called.isdisjoint(owners[weight])
    ]
    if faults:
        raise LoraFxError(faults)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value
