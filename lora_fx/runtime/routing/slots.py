"""Which adapter is in which slot, which of them may go, and where those that are in none lie."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.slots import slot_name


@dataclass(frozen=True)
class Slots:
    """The slots of a model, each with the name of the adapter in it, None if it is empty.

    `room` is what each has room for. `folders` are where adapters were loaded from, those that are
    in no slot too; `pinned` ones stay, and `used` are those in slots, the one that was used last at
    the end.
    """

    room: AdapterPlan
    adapters: tuple[str | None, ...]
    folders: Mapping[str, Path]
    pinned: frozenset[str] = frozenset()
    used: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What each slot is called in the model: as the adapter in it, or as an empty one."""
        return tuple(slot_name(i) if name is None else name for i, name in enumerate(self.adapters))

    @property
    def resident(self) -> tuple[str, ...]:
        """The adapters that are in slots, by slot."""
        return tuple(name for name in self.adapters if name is not None)

    def elsewhere(self, names: Iterable[str]) -> list[str]:
        """Return those of these that are known, and in no slot; each once."""
        once = dict.fromkeys(names)
        return [name for name in once if name in self.folders and name not in self.adapters]

    def places_for(self, names: Collection[str], kept: Collection[str]) -> dict[str, int] | None:
        """Return a slot for each of these adapters, None if there are not as many.

        An adapter that is there keeps its own; others get empty ones first, then those of adapters
        that were not used for the longest time, but never of pinned and of `kept` ones.
        """
        stay = {*names, *kept, *self.pinned}
        old = [self.adapters.index(name) for name in self.used if name not in stay]
        places = [*(i for i, name in enumerate(self.adapters) if name is None), *old]
        found = {name: self.adapters.index(name) for name in names if name in self.adapters}
        new = [name for name in names if name not in found]
        if len(new) > len(places):
            return None
        return found | dict(zip(new, places, strict=False))

    def with_adapter(self, name: str, place: int, folder: Path) -> "Slots":
        """Return the slots with an adapter in this one, as the one that was used last."""
        adapters = (*self.adapters[:place], name, *self.adapters[place + 1 :])
        used = tuple(one for one in self.used if one in adapters and one != name)
        folders = {**self.folders, name: folder}
        return replace(self, adapters=adapters, folders=folders, used=(*used, name))

    def registered(self, name: str, folder: Path) -> "Slots":
        """Return the slots with a folder under a name."""
        return replace(self, folders={**self.folders, name: folder})

    def pinning(self, name: str) -> "Slots":
        """Return the slots with an adapter pinned."""
        return replace(self, pinned=self.pinned | {name})

    def unpinning(self, name: str) -> "Slots":
        """Return the slots with an adapter pinned no more."""
        return replace(self, pinned=self.pinned - {name})

    def without(self, name: str) -> "Slots":
        """Return the slots without an adapter, whose folder is forgotten."""
        return replace(
            self,
            adapters=tuple(None if one == name else one for one in self.adapters),
            folders={one: folder for one, folder in self.folders.items() if one != name},
            pinned=self.pinned - {name},
            used=tuple(one for one in self.used if one != name),
        )

    def touched(self, names: Iterable[str]) -> "Slots":
        """Return the slots once these adapters, of those that are there, have been used."""
        now = tuple(name for name in dict.fromkeys(names) if name in self.adapters)
        return replace(self, used=(*(name for name in self.used if name not in now), *now))
