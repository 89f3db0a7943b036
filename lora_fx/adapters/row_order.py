"""Ask a model without weights whose rows reach adapted parameters, before a batch is mixed.

A module with adapted parameters gets samples in dimension 0 of its first tensor, or the tokens of
all samples, sample after sample. That is proven here, and not guessed by numbers of rows: the model
is run on meta tensors, from those that modules get as (samples, tokens, …) on, and whose rows are
whose is followed through each function that it calls (`graph/rows.py`). In the same run each
product with an adapted parameter has to know its rows (`sites/routed_rows.py`).
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lora_fx.adapters import storage
from lora_fx.adapters.bind import bind
from lora_fx.adapters.routing import Routing
from lora_fx.adapters.sites.adapted_weight import AdaptedWeight
from lora_fx.adapters.sites.routed_rows import Rows
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph.rows import rows_after
from lora_fx.plan.activations.example import example_of
from lora_fx.plan.activations.without_values import WithoutValues
from lora_fx.plan.alike import once_each
from lora_fx.plan.folding import numberless
from lora_fx.plan.plan import Plan
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sample_rows import SAMPLES, TOKENS
from lora_fx.plan.sites import SitePlan

_ANY = "any"


def require_row_order(plan: Plan, sites: Iterable[SitePlan]) -> None:
    """Raise LoraFxError for those of these parameters that get rows of nobody knows which sample.

    Of a model that is none of transformers, or that does not run on meta tensors, nothing is known.
    """
    there: dict[str, SitePlan] = {}
    for site in sites:
        if site.is_parameter:
            there.setdefault(site.name, site)
    if not there:
        return
    known, reason = _asked(plan, list(there.values()))
    faults = [
        Diagnostic(
            "rows-not-samples",
            f"it is not known which rows `{numberless(site.fqn)}` gets of which sample",
            site.rule,
            f"adapts `{numberless(site.name)}`",
            notes=(reason,) if reason else (),
            help="leave it out of the target, or call the model with one adapter at a time, "
            "without `route`: `set_adapter`",
        )
        for site in there.values()
        if site.fqn not in known
    ]
    if faults:
        raise LoraFxError(once_each(faults))


def _asked(plan: Plan, sites: list[SitePlan]) -> tuple[set[str], str]:
    """Return the modules of which the order of the rows is known, and what there is to say."""
    if plan.blueprint is None:
        return set(), "the model is none of transformers, which can be run without weights"
    tree = plan.blueprint.build().eval()
    if getattr(tree.config, "_experts_implementation", None) == "eager":
        tree.set_experts_implementation("batched_mm")  # which gives experts the same rows
    order = _Order()
    try:
        _bind(tree, sites)
        for fqn in {site.fqn for site in sites}:
            order.asks(fqn, tree.get_submodule(fqn))
        order.begins_at(tree)
        with torch.no_grad(), WithoutValues(), order:
            tree(**example_of(tree, SAMPLES, TOKENS).inputs)
    except LoraFxError as error:
        return set(), "; ".join(one.message for one in error.diagnostics)
    except Exception as error:  # whatever a forward does that is not made for meta tensors
        return set(), f"the model does not run without weights: {error}".splitlines()[0]
    return order.known, ""


def _bind(tree: PreTrainedModel, sites: list[SitePlan]) -> None:
    """Adapt these parameters, of a model without weights, and mix a batch."""
    each = tuple(replace(site, adapter=_ANY) for site in sites)
    bind(tree, AdapterPlan(_ANY, "none", each, (), (), (), ()), _empty)
    routing = Routing()
    routing.shares = torch.empty(SAMPLES, 1, device="meta")
    for _, site in storage.sites(tree):
        site.lora_routing = routing
        site.route((_ANY,), 1)


def _empty(site: SitePlan, module: nn.Module) -> dict[str, Tensor]:
    dtype = getattr(torch, site.dtype)
    return {name: torch.empty(s, dtype=dtype, device="meta") for name, s in site.tensors.items()}


class _Order(TorchFunctionMode):
    """Follows which sample each row is of, from (samples, tokens, …) on.

    `known` are the modules that got their rows sample after sample.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: set[str] = set()
        self._of: dict[int, tuple[Tensor, Tensor]] = {}  # tensors are kept: others get no such id
        self._samples = torch.arange(SAMPLES)

    def begins_at(self, tree: nn.Module) -> None:
        """Take what any module gets as (samples, tokens, …) to have samples as its rows."""

        def gets(module: nn.Module, args: Any, kwargs: Any) -> None:
            for x in (*args, *kwargs.values()):
                if isinstance(x, Tensor) and x.ndim > 2 and x.shape[:2] == (SAMPLES, TOKENS):
                    self._of.setdefault(id(x), (x, self._samples))

        for module in tree.modules():
            module.register_forward_pre_hook(gets, with_kwargs=True, prepend=True)

    def asks(self, fqn: str, module: nn.Module) -> None:
        """Note of a module whether it gets its rows in order."""
        tokens = self._samples.repeat_interleave(TOKENS)

        def gets(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = next(iter((*args, *kwargs.values())), None)
            _, of = self._of.get(id(x), (None, None))
            if of is not None and any(torch.equal(of, one) for one in (self._samples, tokens)):
                self.known.add(fqn)

        module.register_forward_pre_hook(gets, with_kwargs=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function; note whose the rows of its result are, where that is known."""
        kwargs = kwargs or {}
        for kind in (AdaptedWeight, Rows):  # before what stands in for a function of tensors
            if any(isinstance(one, kind) for one in args):
                return kind.__torch_function__(func, (), args, kwargs)
        result = func(*args, **kwargs)
        places = [i for i, one in enumerate(args) if id(one) in self._of]
        if places:
            of = [self._of[id(args[i])][1] for i in places]
            if all(torch.equal(of[0], other) for other in of):
                name = getattr(func, "__name__", "")
                for one in result if isinstance(result, tuple | list) else (result,):
                    rows = rows_after(name, places[0], of[0], args, kwargs, one)
                    self._of.pop(id(one), None)  # what works in place returns its argument
                    if rows is not None:
                        self._of[id(one)] = one, rows
        return result
