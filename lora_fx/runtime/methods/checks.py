"""What must hold before adapters of a compiled model are touched."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from lora_fx.adapters.peft.keys import expected_shapes
from lora_fx.adapters.routing import Routing
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.plan import Plan
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.slots import is_slot
from lora_fx.plan.token_routing import routed, routing_faults
from lora_fx.plan.variants import invocation_of
from lora_fx.runtime.routing.routes import Routes
from lora_fx.spec.spec import ArrowSpec

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class AdapterChecks(_Base):
    """Mixin for the root of a compiled model; what does not hold raises LoraFxError."""

    lora_fx_plan: Plan
    lora_fx_adapters: dict[str, AdapterPlan]
    lora_fx_merged: tuple[str, ...]
    lora_fx_routing: Routing
    lora_fx_routes: Routes

    def _require_base_unmerged(self, plan: AdapterPlan) -> None:
        """Raise LoraFxError if an adapter changes weights while others are folded into them."""
        if any(site.changes_base for site in plan.sites):
            self._require_unmerged(self.lora_fx_merged)

    def _require_unmerged(self, names: tuple[str, ...]) -> None:
        """Raise LoraFxError if one of these adapters is folded into the weights."""
        there = [name for name in self.lora_fx_merged if name in names]
        if there:
            message = f"adapter `{there[0]}` is merged into the weights"
            help = "call `unmerge_adapter()` first"
            raise LoraFxError((Diagnostic("adapter-merged", message, help=help),))

    def _require_columns(self, new: tuple[str, ...]) -> None:
        """Raise LoraFxError if a mixed batch runs whose samples would get others' adapters."""
        if self.lora_fx_routing.shares_around is None:
            return
        old = self.lora_fx_routes.adapters
        if len(new) > len(old) or any(new[i] in old and new[i] != old[i] for i in range(len(new))):
            message = "an adapter comes or goes while a mixed batch runs: samples would be mixed up"
            help = "load, combine and delete adapters between calls"
            raise LoraFxError((Diagnostic("bad-routing", message, help=help),))

    def _require_known(self, names: tuple[str, ...]) -> None:
        known = ", ".join(f"`{name}`" for name in self.lora_fx_adapters)
        help = f"the adapters are {known}" if known else "the model has none"
        unknown = tuple(
            Diagnostic("unknown-adapter", f"there is no adapter `{name}`", None, help=help)
            for name in names
            if name not in self.lora_fx_adapters
        )
        if unknown:
            raise LoraFxError(unknown)

    def _require_rank(self, plan: AdapterPlan) -> None:
        """Raise LoraFxError if an adapter has a larger rank than the spec's `max_rank`."""
        route = self.lora_fx_plan.spec.route
        ranks = [site.rank for site in plan.sites]
        if (
            route is not None
            and route.max_rank is not None
            and max(ranks, default=0) > route.max_rank
        ):
            message = f"`{plan.name}` has rank {max(ranks)}, and `max_rank` is {route.max_rank}"
            help = "write a larger `max_rank` in `route`, or compress the adapter: `rank = svd(…)`"
            raise LoraFxError((Diagnostic("rank-too-large", message, help=help),))

    def _arrow(self) -> ArrowSpec | None:
        """Return how the spec routes tokens, None if it does not."""
        route = self.lora_fx_plan.spec.route
        return None if route is None else route.arrow

    def _first(self, adapters: Mapping[str, AdapterPlan]) -> tuple[str, ...]:
        """Return what is active where nothing says so: the first of these, or all with arrow."""
        arrow = self._arrow()
        return tuple(adapters)[:1] if arrow is None else routed(arrow, adapters)

    def _require_tokens_routable(
        self, active: tuple[str, ...], there: Mapping[str, AdapterPlan] | None = None
    ) -> None:
        """Raise LoraFxError if the spec routes tokens, and they cannot be among these adapters."""
        arrow = self._arrow()
        adapters = self.lora_fx_adapters if there is None else there
        faults = [] if arrow is None else routing_faults(arrow, active, adapters)
        if faults:  # an adapter that was loaded has no line in the spec
            raise LoraFxError(replace(fault, span=None) for fault in faults)

    def _require_no_arrow(self) -> None:
        """Raise LoraFxError if the spec routes tokens: then no one weight is what a layer does."""
        if self._arrow() is not None:
            message = "each token is routed by itself, and a weight would be the same for all"
            help = "compile without `by = arrow(…)` what is to be merged"
            raise LoraFxError((Diagnostic("cannot-merge", message, help=help),))

    def _require_same(self, adapter: str, new: AdapterPlan) -> None:
        present = self.lora_fx_adapters[adapter]
        if expected_shapes(present, self) != expected_shapes(new, self):
            message = f"adapter `{adapter}` is there with other modules or ranks"
            help = f'call `delete_adapter("{adapter}")` first, or load under another name'
            raise LoraFxError((Diagnostic("adapter-exists", message, None, help=help),))
        if invocation_of(present.sites) != invocation_of(new.sites):
            message = f"adapter `{adapter}` is there and waits for other tokens, or for none"
            help = f'call `delete_adapter("{adapter}")` first, or load under another name'
            raise LoraFxError((Diagnostic("adapter-exists", message, None, help=help),))


def check_name(name: str) -> None:
    """Raise LoraFxError for what cannot name an adapter."""
    taken = name in ("", "base", "__base__") or is_slot(name) or hasattr(nn.ModuleDict(), name)
    if taken or set("./\\") & set(name):
        message = f"`{name}` cannot name an adapter"
        help = "choose a name without dots and slashes, not `base` and no word of `nn.ModuleDict`"
        raise LoraFxError((Diagnostic("adapter-name", message, None, help=help),))
