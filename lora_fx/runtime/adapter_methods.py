"""Adapters by name on a compiled model: PEFT's method names, on any `nn.Module`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lora_fx.adapters import storage
from lora_fx.adapters.bind import activate, remove, require_compatible
from lora_fx.adapters.peft.folders import local
from lora_fx.adapters.peft.read import LoadedSite, read
from lora_fx.adapters.peft.write import write
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.memory import count_elements
from lora_fx.plan.plan import Plan
from lora_fx.plan.modules import linear_modules
from lora_fx.runtime.saved_spec import save_spec

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class AdapterMethods(_Base):
    """Mixin for the root of a compiled model.

    Active and trainable are two things: nothing here changes `requires_grad` or training mode of
    an adapter that is already there.
    """

    lora_fx_plan: Plan
    lora_fx_adapters: tuple[str, ...]
    lora_fx_active: tuple[str, ...]
    lora_fx_enabled: bool

    def active_adapters(self) -> list[str]:
        """Return the adapters that take part in the forward, in the order they are added up."""
        return list(self.lora_fx_active)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make these adapters the active ones; several add up.

        Raises LoraFxError for names that are unknown or stand twice.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        self._require_known(names)
        if len(set(names)) < len(names):
            message = f"an adapter is named twice: {', '.join(f'`{name}`' for name in names)}"
            raise LoraFxError((Diagnostic("adapter-twice", message, None),))
        require_compatible(self, names)
        self.lora_fx_active = names
        self._activate()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute the base model inside the block; afterwards everything is as it was."""
        before = self.lora_fx_enabled
        self.lora_fx_enabled = False
        self._activate()
        try:
            yield
        finally:
            self.lora_fx_enabled = before
            self._activate()

    def disable_adapters(self) -> None:
        """Compute the base model until `enable_adapters`."""
        self.lora_fx_enabled = False
        self._activate()

    def enable_adapters(self) -> None:
        """Let the active adapters take part again."""
        self.lora_fx_enabled = True
        self._activate()

    def load_adapter(
        self, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False
    ) -> None:
        """Load a PEFT folder or hub id under a name, all of it or nothing; not activated.

        For a name that is already there only values and scalings are replaced, and only if the
        folder has the same modules and ranks. Raises LoraFxError naming every fault; the model is
        then bit-identical to before.
        """
        layer_map = self.lora_fx_plan.layer_map
        if adapter_name not in self.lora_fx_adapters:
            _check_name(adapter_name)
        loaded = read(
            local(model_id), self, list(layer_map.old) if layer_map else None, linear_modules(self)
        )
        if adapter_name in self.lora_fx_adapters:
            self._overwrite(adapter_name, loaded)
            return
        for fqn, part in loaded.items():
            site = storage.mark(self.get_submodule(fqn))  # type: ignore[arg-type]
            device = storage.base_device(site)
            tensors = {name: tensor.to(device) for name, tensor in part.tensors.items()}
            storage.insert(site, adapter_name, tensors, part.arithmetic, is_trainable)
        self.lora_fx_adapters += (adapter_name,)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if none stays active, the first one left becomes active."""
        self._require_known((adapter_name,))
        self.lora_fx_adapters = tuple(n for n in self.lora_fx_adapters if n != adapter_name)
        active = tuple(name for name in self.lora_fx_active if name != adapter_name)
        self.lora_fx_active = active or self.lora_fx_adapters[:1]
        self._activate()
        remove(self, adapter_name)

    def print_trainable_parameters(self) -> None:
        """Print trainable and total parameter counts, as PEFT does."""
        total = sum(count_elements(p) for p in self.parameters())
        trainable = sum(count_elements(p) for p in self.parameters() if p.requires_grad)
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} "
            f"|| trainable%: {100 * trainable / total:.4f}"
        )

    def save_adapters(self, folder: str | Path) -> None:
        """Write each adapter as a PEFT folder: `default` in the folder itself, others below it."""
        layer_map = self.lora_fx_plan.layer_map
        config = getattr(self, "config", None)
        for name in self.lora_fx_adapters:
            write(
                Path(folder) if name == "default" else Path(folder) / name,
                self,
                name,
                base=getattr(config, "_name_or_path", None) or None,
                task=_task(self),
                replication=list(layer_map.ranges) if layer_map else None,
            )
        save_spec(Path(folder), self.lora_fx_plan.spec)

    def _activate(self) -> None:
        activate(self, self.lora_fx_active if self.lora_fx_enabled else ())

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

    def _overwrite(self, adapter: str, loaded: dict[str, LoadedSite]) -> None:
        present = {
            fqn: site for fqn, site in storage.sites(self) if adapter in site.lora_arithmetic
        }
        same = present.keys() == loaded.keys() and all(
            storage.tensors(site, adapter)[name].shape == tensor.shape
            for fqn, site in present.items()
            for name, tensor in loaded[fqn].tensors.items()
        )
        if not same:
            message = f"adapter `{adapter}` is there with other modules or ranks"
            help = f'call `delete_adapter("{adapter}")` first, or load under another name'
            raise LoraFxError((Diagnostic("adapter-exists", message, None, help=help),))
        for fqn, site in present.items():
            new = loaded[fqn].arithmetic
            kept = replace(
                site.lora_arithmetic[adapter],
                alpha=new.alpha,
                scaling=new.scaling,
                rslora=new.rslora,
            )
            storage.overwrite(site, adapter, loaded[fqn].tensors, kept)
        self._activate()


def _check_name(name: str) -> None:
    taken = name in ("", "base", "__base__") or hasattr(nn.ModuleDict(), name)
    if taken or set("./\\") & set(name):
        message = f"`{name}` cannot name an adapter"
        help = "choose a name without dots and slashes, not `base` and no word of `nn.ModuleDict`"
        raise LoraFxError((Diagnostic("adapter-name", message, None, help=help),))


def _task(model: nn.Module) -> str | None:
    heads = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    name = type(model).__name__
    return next((task for head, task in heads.items() if name.endswith(head)), None)
