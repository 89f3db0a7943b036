"""More adapters on disk than in memory: `load_adapter` into slots, which compiles nothing."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fx.adapters import slots as places
from lora_fx.adapters.combine.combine import Combined
from lora_fx.adapters.peft.folders import local
from lora_fx.adapters.peft.keys import live_tensors
from lora_fx.adapters.peft.read import Loaded, read
from lora_fx.adapters.undo import undone_on_error
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.alike import once_each
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.slots import room_of, slot_name
from lora_fx.runtime.methods.checks import check_name
from lora_fx.runtime.methods.convert import ConvertMethods
from lora_fx.runtime.routing.slots import Slots
from lora_fx.spec.spec import RouteSpec


class SlotMethods(ConvertMethods):
    """Mixin for the root of a compiled model. Without `slots` in the spec nothing is otherwise.

    With them, the adapters of the spec are always there, and all others are in slots, or known by
    their folders alone: naming one in a call, or activating it, brings it in.
    """

    lora_fx_slots: Slots | None

    def load_adapter(
        self, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False
    ) -> None:
        """Load a PEFT folder or hub id under a name, all of it or nothing; not activated.

        See `AdapterMethods`. With `slots` it goes into one, in the place of the adapter that was
        not used for the longest time if none is empty, and nothing is compiled. Raises LoraFxError
        too if it does not fit there, if all adapters that are there have to stay, and for one to be
        trained; the model is then bit-identical to before.
        """
        if not self._goes_into_slot(adapter_name):
            super().load_adapter(model_id, adapter_name, is_trainable)
            return
        check_name(adapter_name)
        if is_trainable:
            message = f"`{adapter_name}` would be in a slot, where nothing is trained"
            help = f"write it into the spec: `adapter {adapter_name} {{ weights = … }}`"
            raise LoraFxError((Diagnostic("no-slot", message, help=help),))
        self._bring_in({adapter_name: local(model_id)})

    def register_adapter(self, model_id: str | Path, adapter_name: str) -> None:
        """Let a folder or hub id be known by a name, and loaded into a slot once it is named.

        Raises LoraFxError if the model has no slots, and for a name that an adapter has. What is in
        the folder is looked at when it is loaded.
        """
        slots = self._slots()
        check_name(adapter_name)
        if adapter_name in self.lora_fx_adapters:
            message = f"there is an adapter `{adapter_name}` already"
            help = f'call `delete_adapter("{adapter_name}")` first, or choose another name'
            raise LoraFxError((Diagnostic("adapter-exists", message, help=help),))
        self.lora_fx_slots = slots.registered(adapter_name, local(model_id))

    def pin_adapter(self, adapter_name: str) -> None:
        """Keep an adapter in its slot until `unpin_adapter`; one that is in none is brought in."""
        self.bring_in([adapter_name])
        self._require_known((adapter_name,))
        slots = self._slots()
        if adapter_name in slots.adapters:
            self.lora_fx_slots = slots.pinning(adapter_name)

    def unpin_adapter(self, adapter_name: str) -> None:
        """Let an adapter make room for another one again."""
        self._require_known((adapter_name,))
        self.lora_fx_slots = self._slots().unpinning(adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make these adapters the active ones; those that are in no slot are brought in.

        While they are active they stay. See `AdapterMethods`.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        slots = self.lora_fx_slots
        known = [*self.lora_fx_adapters, *(() if slots is None else slots.folders)]
        if len(set(names)) == len(names) and all(name in known for name in names):
            self.bring_in(names)
        super().set_adapter(adapter_name)
        if self.lora_fx_slots is not None:
            self.lora_fx_slots = self.lora_fx_slots.touched(names)
            self._activate()  # with the slots' parameters as they are now

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, whose slot is empty then; see `AdapterMethods`."""
        slots = self.lora_fx_slots
        if slots is not None and slots.elsewhere([adapter_name]):
            self.lora_fx_slots = slots.without(adapter_name)
        else:
            super().delete_adapter(adapter_name)

    def hotswap_adapter(self, model_id: str | Path, adapter_name: str = "default") -> None:
        """Put a PEFT folder or hub id in the place of an adapter that is there, as it is compiled.

        See `LiveMethods`; of one in a slot, any that a slot has room for.
        """
        if self.lora_fx_slots is not None and adapter_name in self.lora_fx_slots.adapters:
            self.load_adapter(model_id, adapter_name)
        else:
            super().hotswap_adapter(model_id, adapter_name)

    def bring_in(self, names: Sequence[str]) -> None:
        """Load those of these adapters that are known and in no slot; nothing if one is unknown."""
        slots = self.lora_fx_slots
        missing = [] if slots is None else slots.elsewhere(names)
        if slots is None or not missing:
            return
        if self.training and torch.is_grad_enabled():
            message = f"`{missing[0]}` is in no slot, and a step of training does not bring it in"
            help = f'call `load_adapter(folder, "{missing[0]}")` between steps'
            raise LoraFxError((Diagnostic("no-slot", message, help=help),))
        self._bring_in({name: slots.folders[name] for name in missing}, names)

    def _bring_in(self, folders: Mapping[str, Path], beside: Collection[str] = ()) -> None:
        """Put the adapters of these folders in slots, by name, and keep those `beside` them."""
        slots = self._slots()
        self._require_idle()
        self._require_unmerged(tuple(folders))
        new = self._read(folders, slots)
        kept = {*beside, *self.lora_fx_active, *self.lora_fx_merged}
        chosen = slots.places_for(tuple(folders), kept)
        if chosen is None:
            raise _all_taken(list(folders), slots)
        held = [slots.names[place] for place in chosen.values()]
        changed = [tensor for name in held for tensor in live_tensors(self, name).values()]
        with undone_on_error(self, changed):
            for name, place in chosen.items():
                self._put(name, place, new[name], folders[name])
            self._activate()

    def _put(self, name: str, place: int, new: Loaded, folder: Path) -> None:
        slots = self._slots()
        before = slots.names[place]
        if before != name:
            places.rename(self, before, name)
        plan = places.fill(self, slots.room, name, new)
        self.lora_fx_slots = slots.with_adapter(name, place, folder)
        others = {n: p for n, p in self.lora_fx_adapters.items() if n not in (before, name)}
        resident = {**others, name: plan}
        in_slots = [one for one in self.lora_fx_slots.resident if one in resident]
        order = [*(one for one in resident if one not in in_slots), *in_slots]
        self.lora_fx_adapters = {one: resident[one] for one in order}

    def _read(self, folders: Mapping[str, Path], slots: Slots) -> dict[str, Loaded]:
        """Read these folders, checked against the slots; raise LoraFxError with all faults."""
        found: dict[str, Loaded] = {}
        faults: list[Diagnostic] = []
        for name, folder in folders.items():
            try:
                found[name] = read(folder, name, self, self._layers())
                faults += once_each(_misfits(name, places.misfits(slots.room, found[name], self)))
            except LoraFxError as error:
                faults += error.diagnostics
        if faults:
            raise LoraFxError(faults)
        return found

    def _goes_into_slot(self, name: str) -> bool:
        slots = self.lora_fx_slots
        return slots is not None and (name not in self.lora_fx_adapters or name in slots.adapters)

    def _slots(self) -> Slots:
        if self.lora_fx_slots is None:
            message = "the model has no slots that adapters could come into and leave"
            help = "write `route { slots = 8  max_rank = 64 }`, or call `load_adapter`"
            raise LoraFxError((Diagnostic("no-slot", message, help=help),))
        return self.lora_fx_slots

    def _require_idle(self) -> None:
        if self.lora_fx_routing.is_running:
            message = "slots cannot change while the model runs: its samples would be mixed up"
            help = "load adapters between calls"
            raise LoraFxError((Diagnostic("no-slot", message, help=help),))

    def _drop(self, adapter: str) -> None:
        slots = self.lora_fx_slots
        if slots is None or adapter not in slots.adapters:
            super()._drop(adapter)
            return
        places.clear(self, slots.room, adapter)
        places.rename(self, adapter, slot_name(slots.adapters.index(adapter)))
        self.lora_fx_slots = slots.without(adapter)

    def _columns(self) -> tuple[str, ...]:
        slots = self.lora_fx_slots
        if slots is None:
            return super()._columns()
        own = (name for name in self.lora_fx_adapters if name not in slots.adapters)
        return (*own, *slots.names)

    def _columns_without(self, adapter: str) -> tuple[str, ...]:
        slots = self.lora_fx_slots
        is_slot = slots is not None and adapter in slots.adapters
        return self._columns() if is_slot else super()._columns_without(adapter)

    def _watched(self) -> tuple[str, ...]:
        slots = () if self.lora_fx_slots is None else self.lora_fx_slots.adapters
        own = (name for name in self.lora_fx_adapters if name not in slots)
        return (*own, *(slot_name(number) for number, _ in enumerate(slots)))

    def _own_tensors(self, adapter: str) -> dict[str, Tensor]:
        found, slots = super()._own_tensors(adapter), self.lora_fx_slots
        if slots is None or adapter not in slots.adapters:
            return found
        return places.at_own_rank(found, slots.room, self.lora_fx_adapters[adapter], self)

    def _add(self, new: Combined) -> None:
        if self.lora_fx_slots is not None:
            message = f"`{new.plan.name}` would be made beside the slots, and change all graphs"
            help = "write a `merge` into the spec, or save the result elsewhere and load it"
            raise LoraFxError((Diagnostic("no-slot", message, help=help),))
        super()._add(new)


def reserve_slots(model: Any, route: RouteSpec, sites: Sequence[SitePlan]) -> None:
    """Give a compiled model, in place, the slots that there are beside its adapters.

    They have room at these sites, those of the spec's adapters.
    """
    count = (route.slots or 0) - len(model.lora_fx_adapters)
    if count <= 0:
        return
    room = room_of(route, sites)
    model.lora_fx_slots = Slots(room, (None,) * count, {})
    for name in model.lora_fx_slots.names:
        places.reserve(model, room, name)
    places.stack(model, room, model.lora_fx_slots.names)
    model._activate()


def restore_slots(model: Any, route: RouteSpec) -> None:
    """Give a model that was loaded, in place, the slots of the spec that it was saved with."""
    plan = model.lora_fx_plan
    model.lora_fx_plan = replace(plan, spec=replace(plan.spec, route=route))
    reserve_slots(model, route, [s for one in model._plans() for s in one.sites])


def _misfits(name: str, found: Iterator[str]) -> list[Diagnostic]:
    what = f"`{name}` does not fit into a slot"
    help = (
        "slots have room for `max_rank` at the modules that the spec's adapters adapt, and for "
        "norms and biases where those have them"
    )
    faults = [Diagnostic("no-slot", f"{what}: {one}") for one in found]
    return [Diagnostic("no-slot", faults[0].message, help=help), *faults[1:]] if faults else []


def _all_taken(names: list[str], slots: Slots) -> LoraFxError:
    def listed(some: Collection[str]) -> str:
        return ", ".join(f"`{name}`" for name in some) or "none"

    message = f"there is no slot for {listed(names)}: all {len(slots.adapters)} are taken"
    staying = [name for name in slots.resident if name in slots.pinned]
    note = f"in slots are {listed(slots.resident)}; pinned of them {listed(staying)}"
    help = "call `unpin_adapter` or `delete_adapter`, activate another, or write more `slots`"
    return LoraFxError((Diagnostic("no-slot", message, notes=(note,), help=help),))
