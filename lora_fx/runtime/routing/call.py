"""One call of a compiled model in which every sample has its own adapter.

Names become rows of a small table here, on the host: to the graph they are numbers, the shares of
the adapters in each sample, and none of them is read back from a device; but for indices that a
call in training brings on one.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_fx.adapters.routable import unroutable
from lora_fx.adapters.routing import Shares
from lora_fx.adapters.row_order import require_row_order
from lora_fx.adapters.storage import modules_with_sites
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.sample_rows import require_sample_rows
from lora_fx.runtime.routing.invocation import in_call
from lora_fx.runtime.routing.present import note_present
from lora_fx.runtime.units.uncalled import run_watched
from lora_fx.spec.spec import RouteSpec

INDICES = "adapter_indices"
NAMES = "adapter_names"
_SAMPLES = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features")


def argument_of(route: RouteSpec | None) -> str:
    """Return the keyword of `forward` and `generate` that takes the names."""
    return route.argument if route else NAMES


@dataclass(frozen=True)
class Routed:
    """What a call says: which rows of the table its samples have, and what that gives them.

    `rows` (S,), int32, are on the host, unless the call brought them on a device; `shares`
    (S, adapters), float32, lie where the samples do, and are `()` if all are of the base, which
    then costs what the base costs. Both are None if nothing is routed, `shares` also while adapters
    are disabled.
    """

    rows: Tensor | None = None
    shares: Shares | None = None


def run_routed(
    model: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Collection[str] | None]:
    """Run a model with the adapters that the call names, or those that are active.

    Inside a call that is routed already, that routing stays unless there is another one. Returns
    with the result the adapters that learn from a mixed batch, None if there is nothing of it.
    """
    if torch.compiler.is_compiling():
        return run_watched(model, forward, args, kwargs), None
    call = route_call(model, args, kwargs)
    routing = model.lora_fx_routing
    shares = routing.shares_around if call.rows is None else call.shares
    there = partial(adapters_in, model, call)
    invocations = in_call(model, shares is not None, there, forward, args, kwargs)
    with routing.of(shares, invocations.invoked):
        result = run_watched(model, forward, args, kwargs)
        if torch.is_grad_enabled():
            routing.again(result)
    invocations.note(result)
    return result, _noted(model, call, result) if torch.is_grad_enabled() else None


def adapters_in(model: Any, call: "Routed") -> set[str]:
    """Return the adapters that some sample of a call has; rows on a device are waited for."""
    if call.shares is not None and call.rows is not None:
        return model.lora_fx_routes.present(call.rows.tolist())
    return set(model.lora_fx_adapters if call.rows is None else ())


def _noted(model: Any, call: "Routed", result: Any) -> Collection[str] | None:
    """Note the adapters that a backward pass through the result is of; return a mixed batch's."""
    route = model.lora_fx_plan.spec.route
    if call.shares is not None and call.rows is not None:
        present = model.lora_fx_routes.present(call.rows.tolist())
        note_present(model, result, present)
        return present
    is_noted = model.lora_fx_present is not None or (route and route.train)
    if is_noted and model.lora_fx_enabled:
        note_present(model, result, set(model.lora_fx_active))
    return None


def route_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routed:
    """Take the routing out of a call's arguments, or the default where it has none.

    Raises LoraFxError for what cannot be routed so; nothing has been changed then.
    """
    route, routes = model.lora_fx_plan.spec.route, model.lora_fx_routes
    names, rows = kwargs.pop(argument_of(route), None), kwargs.pop(INDICES, None)
    first = _first(args, kwargs)
    if route is not None and route.arrow is not None and not (names is None and rows is None):
        raise _fault(
            "the call names adapters for its samples, and each token is routed by itself",
            "leave the names out, or `by = arrow(…)` in the spec",
        )
    if names is not None and rows is not None:
        raise _fault(f"the call has both `{argument_of(route)}` and `{INDICES}`", "give one")
    if names is not None:
        rows = torch.tensor(_rows_of(model, _checked_names(names), first), dtype=torch.int32)
        routes = model.lora_fx_routes
    elif rows is not None:
        _require_indices(rows, len(routes.names))
    elif model.lora_fx_default is None or model.lora_fx_routing.shares_around is not None:
        return Routed()
    else:
        rows = torch.full((1 if first is None else len(first),), model.lora_fx_default)
    _require_length(len(rows), first)
    if model.lora_fx_slots is not None and rows.device.type == "cpu":
        used = (routes.names[row] for row in set(rows.tolist()) if row >= 0)
        model.lora_fx_slots = model.lora_fx_slots.touched(used)
    if not model.lora_fx_enabled:
        return Routed(rows)
    _require_routable(model)
    if _is_base_alone(model, rows):
        return Routed(rows, ())
    return Routed(rows, routes.shares(rows, rows.device if first is None else first.device))


def _is_base_alone(model: Any, rows: Tensor) -> bool:
    """Whether it is known at once that nothing is added to the base in a call.

    Not where gradients are taken: there adapters stay in the graph, so that a loss of the base
    alone has a backward pass, in which they do not move.
    """
    is_known = rows.device.type == "cpu" and not torch.is_grad_enabled()
    whole = model.lora_fx_routing.is_base_whole
    return is_known and whole and not model.lora_fx_routes.adds_to(rows)


def _rows_of(model: Any, names: list[str], first: Tensor | None) -> list[int]:
    """Return the row of each name; adapters that are known and in no slot are brought in."""
    slots = model.lora_fx_slots
    elsewhere = () if slots is None else slots.elsewhere(slots.folders)
    model.lora_fx_routes.require_known(names, elsewhere)
    _require_length(len(names), first)
    model.bring_in(names)
    return model.lora_fx_routes.indices(names)


def _require_length(names: int, first: Tensor | None) -> None:
    if first is not None and names != len(first):
        raise _fault(
            f"there are names of adapters for {names} samples, and {len(first)} samples",
            "give one name for each sample of the batch",
        )


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tensor that says how many samples there are, and where."""
    known = [kwargs[name] for name in _SAMPLES if name in kwargs]
    given = (value for value in (*known, *args, *kwargs.values()) if isinstance(value, Tensor))
    return next((tensor for tensor in given if tensor.ndim), None)


def _checked_names(names: Any) -> list[str]:
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return list(names)
    raise _fault("names of adapters are a list of text, one for each sample", None)


def _require_indices(rows: Any, names: int) -> None:
    """Look at values only where nothing has to be waited for."""
    is_whole = isinstance(rows, Tensor) and rows.ndim == 1 and not rows.is_floating_point()
    if not is_whole or rows.dtype is torch.bool:
        raise _fault(f"`{INDICES}` is a tensor (S,) of whole numbers, -1 for the base", None)
    if rows.device.type == "cpu" and not bool(((rows.long() >= -1) & (rows.long() < names)).all()):
        raise _fault(f"`{INDICES}` are from -1, the base, to {names - 1}", None)


def _require_routable(model: Any) -> None:
    model._require_unmerged(model.lora_fx_merged)
    route = model.lora_fx_plan.spec.route
    if model.training and torch.is_grad_enabled() and not (route and route.train):
        message = "a batch of several adapters is trained, and the spec does not say so"
        raise _fault(message, "write `route { train = true }`, or call `model.eval()`")
    if model.training and _processes() > 1:
        raise _fault(
            f"a batch of several adapters is trained in {_processes()} processes",
            "they would have to agree on which adapters are absent, and do not yet: train in one",
        )
    plans = model.lora_fx_adapters.values()
    if any(plan.modules or plan.tokens or plan.biases for plan in plans):  # else of factors only
        faults = unroutable(model, model.training)
        if faults:
            raise LoraFxError(faults)
    if model.lora_fx_rows_known != model.lora_fx_sited:
        adapted = (site for plan in model.lora_fx_adapters.values() for site in plan.sites)
        require_sample_rows(model.lora_fx_plan, modules_with_sites(model))
        require_row_order(model.lora_fx_plan, adapted)
        model.lora_fx_rows_known = model.lora_fx_sited


def _processes() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _fault(message: str, help: str | None) -> LoraFxError:
    return LoraFxError((Diagnostic("bad-routing", message, help=help),))
