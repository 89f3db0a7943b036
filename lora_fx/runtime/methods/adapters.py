"""Adapters by name on a compiled model: PEFT's method names, on any `nn.Module`."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lora_fx.adapters import storage, token_rows
from lora_fx.adapters.bind import activate, bind, remove, require_compatible
from lora_fx.adapters.peft.folders import local
from lora_fx.adapters.peft.keys import adapter_tensors, live_tensors, overwrite, without_values
from lora_fx.adapters.peft.read import Loaded, read
from lora_fx.adapters.peft.task import task_of
from lora_fx.adapters.peft.write import folder_config, write
from lora_fx.adapters.routing import Routing
from lora_fx.adapters.sites import encoder_layers
from lora_fx.adapters.undo import undone_on_error
from lora_fx.adapters.weights import own_outputs
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.invocable import require_invocable
from lora_fx.plan.lora_fa import lora_fa_faults, with_frozen_A
from lora_fx.plan.memory import count_elements
from lora_fx.plan.offloaded import distinct_parameters
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.variants import invocation_of
from lora_fx.runtime.auxiliary_loss import auxiliary_loss
from lora_fx.runtime.methods.checks import AdapterChecks, check_name
from lora_fx.runtime.routing.present import Stepped
from lora_fx.runtime.routing.routes import Routes, routes_of
from lora_fx.runtime.saved_spec import save_spec
from lora_fx.runtime.status import LayerStatus, ModelStatus, layer_status, model_status
from lora_fx.spec.together import together


class AdapterMethods(AdapterChecks):
    """Mixin for the root of a compiled model.

    Active and trainable are two things: nothing here changes `requires_grad` or training mode of
    an adapter that is already there.
    """

    lora_fx_active: tuple[str, ...]
    lora_fx_enabled: bool
    lora_fx_watched: set[tuple[tuple[str, ...], bool]]
    lora_fx_routing: Routing
    lora_fx_routes: Routes
    lora_fx_sited: tuple[str, ...]  # the adapted modules
    lora_fx_rows_known: tuple[str, ...]  # those of which it is known that their rows are samples
    lora_fx_default: int | None
    lora_fx_invocations: dict[str, tuple[int, ...]]  # of those that wait for tokens of their own
    lora_fx_present: dict[str, Stepped] | None
    lora_fx_owned: dict[str, list[nn.Module]] | None  # what adapters own, once it was asked for

    def active_adapters(self) -> list[str]:
        """Return the adapters that take part in the forward, in the order they are added up."""
        return list(self.lora_fx_active)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make these adapters the active ones; several add up.

        From now on, they are what a call without names gets, whatever `default` in the spec says.
        Where the spec says `by = arrow(…)`, each token is routed among them instead. Raises
        LoraFxError for names that are unknown or stand twice, and for adapters among which no
        token can be routed.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        self._require_known(names)
        if len(set(names)) < len(names):
            message = f"an adapter is named twice: {', '.join(f'`{name}`' for name in names)}"
            raise LoraFxError((Diagnostic("adapter-twice", message, None),))
        require_compatible(self, names, self.lora_fx_merged)
        self._require_tokens_routable(names)
        self.lora_fx_active, self.lora_fx_default = names, None
        self._switch()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute the base model inside the block; afterwards everything is as it was."""
        before = self.lora_fx_enabled
        self.lora_fx_enabled = False
        self._switch()
        try:
            yield
        finally:
            self.lora_fx_enabled = before
            self._switch()

    def disable_adapters(self) -> None:
        """Compute the base model until `enable_adapters`."""
        self.lora_fx_enabled = False
        self._switch()

    def enable_adapters(self) -> None:
        """Let the active adapters take part again."""
        self.lora_fx_enabled = True
        self._switch()

    def load_adapter(
        self, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False
    ) -> None:
        """Load a PEFT folder or hub id under a name, all of it or nothing; not activated.

        For a name that is already there only values and scalings are replaced, and only if the
        folder has the same modules and ranks. Raises LoraFxError naming every fault; the model is
        then bit-identical to before.
        """
        if adapter_name not in self.lora_fx_adapters:
            check_name(adapter_name)
        self._require_unmerged((adapter_name,))
        loaded = read(local(model_id), adapter_name, self, self._layers())
        if adapter_name in self.lora_fx_adapters:
            self._require_same(adapter_name, loaded.plan)
            self._require_base_unmerged(self.lora_fx_adapters[adapter_name])
        self._require_base_unmerged(loaded.plan)
        self._require_rank(loaded.plan)
        with undone_on_error(self, live_tensors(self, adapter_name).values()):
            if adapter_name not in self.lora_fx_adapters:
                require_invocable(self, self.lora_fx_plan, loaded.plan.sites)
                plan = self._planned(loaded.plan.with_trainable(is_trainable))
                bind(self, plan, without_values)
                self.lora_fx_adapters = {**self.lora_fx_adapters, adapter_name: plan}
            self._overwrite(adapter_name, loaded)

    def _planned(self, plan: AdapterPlan) -> AdapterPlan:
        """Return an adapter's plan as the spec's optimizer trains it."""
        optimizer = self.lora_fx_plan.spec.optimizer
        faults = lora_fa_faults((plan,), optimizer)
        if faults:
            raise LoraFxError(faults)
        return with_frozen_A(plan, optimizer)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if none stays active, the first one left becomes active.

        Raises LoraFxError, with nothing changed, while what is merged keeps that from being so.
        """
        self._require_known((adapter_name,))
        self._require_unmerged((adapter_name,))
        self._require_base_unmerged(self.lora_fx_adapters[adapter_name])
        left = {n: plan for n, plan in self.lora_fx_adapters.items() if n != adapter_name}
        active = tuple(name for name in self.lora_fx_active if name != adapter_name)
        active = active or self._first(left)
        require_compatible(self, active, self.lora_fx_merged)
        self._require_tokens_routable(active, left)
        self._require_columns(self._columns_without(adapter_name))
        self.lora_fx_adapters, self.lora_fx_active = left, active
        route = self.lora_fx_plan.spec.route
        if route and route.default and adapter_name in (t.name for t in route.default.terms):
            self.lora_fx_default = None
        self._switch()
        self._drop(adapter_name)
        self._activate()
        self.lora_fx_watched = set()

    def _drop(self, adapter: str) -> None:
        """Delete what a model holds of an adapter, which is not active."""
        remove(self, adapter)

    def get_layer_status(self) -> list[LayerStatus]:
        """Return what adapters have of each module: active, merged, trained, ranks, bytes."""
        return layer_status(self)  # type: ignore[arg-type]

    def get_model_status(self) -> ModelStatus:
        """Return what adapters the model has, which act, learn or are merged, and its bytes."""
        return model_status(self)  # type: ignore[arg-type]

    def print_trainable_parameters(self) -> None:
        """Print trainable and total parameter counts, as PEFT does."""
        parameters = list(distinct_parameters(self))
        total = sum(count_elements(p) for p in parameters)
        trainable = sum(count_elements(p) for p in parameters if p.requires_grad)
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} "
            f"|| trainable%: {100 * trainable / total:.4f}"
        )

    def save_adapters(
        self, folder: str | Path, save_embedding_layers: bool | Literal["auto"] = "auto"
    ) -> None:
        """Write each adapter as a PEFT folder: `default` in the folder itself, others below it.

        With `save_embedding_layers` the weights of input and output embeddings are written too;
        `auto` does so for an adapter that adapts one of them. All files appear together, in the
        place of those that are there. Raises LoraFxError, with nothing written, if an adapter
        trains modules that PEFT has no names for.
        """
        with together(Path(folder)) as beside:
            self._write_adapters(beside, Path(folder), save_embedding_layers)

    def _write_adapters(
        self,
        beside: Path,
        folder: Path,
        save_embedding_layers: bool | Literal["auto"],
        chosen: Collection[str] | None = None,
    ) -> None:
        """Write the chosen adapters, or all and the spec, to be moved into `folder`."""
        for plan in self._plans():
            if chosen is not None and plan.name not in chosen:
                continue
            inside = "." if plan.name == "default" else plan.name
            write_adapter(self, plan, beside / inside, save_embedding_layers, folder / inside)
        if chosen is None:
            save_spec(beside, folder, self.lora_fx_plan.spec)

    def auxiliary_loss(self, adapters: Collection[str] | None = None) -> Tensor | None:
        """Return what variants of adapters add to the loss of a batch, None if it is nothing.

        KaSA's regularisation, MonteCLoRA's divergence; of the active adapters, or the sum of what
        each of those named adds alone: in a mixed batch those that any sample has. A Hugging Face
        model adds it to its loss in training by itself.
        """
        plans = self.lora_fx_adapters
        if adapters is None:
            on = self.lora_fx_active if self.lora_fx_enabled else ()
            return auxiliary_loss(self, [plans[name] for name in on])
        each = (auxiliary_loss(self, [plans[name]]) for name in plans if name in adapters)
        found = [one for one in each if one is not None]
        return sum(found[1:], found[0]) if found else None

    def _plans(self) -> list[AdapterPlan]:
        return list(self.lora_fx_adapters.values())

    def _layers(self) -> list[int] | None:
        layer_map = self.lora_fx_plan.layer_map
        return list(layer_map.old) if layer_map else None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Keep in force what is: torch may put a new parameter into every module."""
        super()._apply(fn, recurse)
        self._activate()
        return self

    def _activate(self) -> None:
        """Let what adapters there are, and how they compute, be in force."""
        self._route()
        self._switch()

    def _switch(self) -> None:
        """Let other ones of the adapters take part; at sites nothing else of them has changed."""
        active, merged = self.lora_fx_active, self.lora_fx_merged
        on = self.lora_fx_enabled
        activate(self, active if on else (), merged if on else (), self._arrow())
        self.lora_fx_routing.in_force = active if on else (), merged
        self._route_own()
        self.lora_fx_routing.settle()

    def _route(self) -> None:
        """Let every site know the columns of the adapters that there are."""
        plans = self.lora_fx_adapters.values()
        found = {plan.name: invocation_of(plan.sites) for plan in plans}
        self.lora_fx_invocations = {name: tokens for name, tokens in found.items() if tokens}
        routes = routes_of(self._columns(), self.lora_fx_plan.spec.route)
        self._require_columns(routes.adapters)
        self.lora_fx_routes = routes
        sites = dict(storage.sites(self))
        self.lora_fx_sited, self.lora_fx_owned = tuple(sites), None
        for site in sites.values():
            site.lora_routing = self.lora_fx_routing
            site.route(self.lora_fx_routes.adapters, self.lora_fx_routes.terms)
        changed = (site.lora_change is not None for site in sites.values())
        self.lora_fx_routing.is_base_whole = not any(changed)
        encoder_layers.note_sites(self)

    def _route_own(self) -> None:
        """Let copies and rows, as they are now, be those of a mixed batch."""
        own_outputs.route(self, self.lora_fx_routes.adapters, self.lora_fx_routing)
        token_rows.route(self, self.lora_fx_routes.adapters, self.lora_fx_routing)

    def _columns_without(self, adapter: str) -> tuple[str, ...]:
        """Return the columns as they are once an adapter is deleted."""
        return tuple(name for name in self._columns() if name != adapter)

    def _columns(self) -> tuple[str, ...]:
        """Return the adapters by their columns in the shares of a mixed batch."""
        return tuple(self.lora_fx_adapters)

    def _watched(self) -> tuple[str, ...]:
        """Return what stands for the adapters of a mixed batch, of which one has to be seen."""
        return tuple(self.lora_fx_adapters)

    def _own_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return what a file of an adapter holds, by name."""
        return adapter_tensors(self, adapter)

    def _overwrite(self, adapter: str, loaded: Loaded) -> None:
        """Put a file's values and scalings in the place of an adapter's own; dropout stays."""
        placed = dict(storage.sites(self))
        for site in loaded.plan.sites:
            here = placed[site.name]
            new = {"alpha": site.alpha, "scaling": site.scaling, "rslora": site.rslora}
            arithmetic = replace(here.lora_arithmetic[adapter], **new)
            storage.compute_as(self, here, adapter, arithmetic)
        overwrite(self, adapter, loaded.tensors)
        self._activate()


def write_adapter(
    model: AdapterMethods,
    plan: AdapterPlan,
    folder: Path,
    save_embedding_layers: bool | Literal["auto"],
    earlier: Path,
) -> None:
    """Write one adapter of a model as a PEFT folder that takes the place of an `earlier` one."""
    config = folder_config(model, plan, model._layers())
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config |= {"base_model_name_or_path": base, "task_type": task_of(model, plan)}
    tensors = model._own_tensors(plan.name)
    write(folder, model, plan, tensors, config, save_embedding_layers, earlier)
