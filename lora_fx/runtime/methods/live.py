"""A compiled model's adapters changed where they are, so that nothing is compiled again."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from lora_fx.adapters import storage
from lora_fx.adapters.hotswap import Swap, obstacles, swap
from lora_fx.adapters.peft.folders import local
from lora_fx.adapters.peft.keys import live_tensors
from lora_fx.adapters.peft.read import read
from lora_fx.adapters.undo import undone_on_error
from lora_fx.adapters.weights.merged import Merged
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.alike import once_each
from lora_fx.runtime.methods.merge import MergeMethods


class LiveMethods(MergeMethods):
    """Mixin for the root of a compiled model: PEFT's names."""

    def hotswap_adapter(self, model_id: str | Path, adapter_name: str = "default") -> None:
        """Put a PEFT folder or hub id in the place of an adapter that is there, as it is compiled.

        Its parameters stay the same objects of the same shapes: a smaller rank is filled up with
        zeros, what the folder lacks of the adapter's sites, magnitudes, biases, copies and rows is
        the base's. It keeps its dropout, and whether it is active and trained. Weights that its
        init had changed are the base's again, to rounding. Saving writes it with the rank that is
        there.

        Raises LoraFxError naming everything that does not fit into it; the model is then
        bit-identical to before.
        """
        self._require_known((adapter_name,))
        self._require_unmerged((adapter_name,))
        loaded = read(local(model_id), adapter_name, self, self._layers())
        present = self.lora_fx_adapters[adapter_name]
        self._require_base_unmerged(present)
        new = Swap(loaded.plan, loaded.tensors)
        faults = [Diagnostic("cannot-swap", one) for one in obstacles(present, new, self)]
        if faults:
            help = "call `load_adapter` with another name, and `set_adapter`"
            raise LoraFxError(once_each([replace(faults[0], help=help), *faults[1:]]))
        with undone_on_error(self, live_tensors(self, adapter_name).values()):
            swap(present, new, self)
            self._activate()

    @contextmanager
    def rescale_adapter_scale(self, multiplier: float) -> Iterator[None]:
        """Multiply the scaling of every adapter inside the block: W + c s B A (PEFT's helper).

        Where an init took s B₀ A₀ out of the weight that is W + c s (B A − B₀ A₀). Blocks inside
        each other multiply. Saving writes the scalings of outside; merging and unloading are
        refused inside. Raises LoraFxError for a
        multiplier that is no finite number, if an adapter is merged, and for one that has norms of
        a weight that it changed.
        """
        faults = list(self._unscalable(multiplier))
        if faults:
            raise LoraFxError(faults)
        self._require_unmerged(self.lora_fx_merged)
        before = self._multiplied(multiplier)
        try:
            yield
        finally:
            for site, value in before:
                site.lora_multiplier = value
            self._activate()

    def _merged_with(
        self, chosen: tuple[str, ...], safe: bool, progressbar: bool, dequantize: bool = False
    ) -> Merged:
        if any(site.lora_multiplier != 1 for _, site in storage.sites(self)):
            message = "scalings are multiplied for a while, and weights would keep that"
            help = "merge outside of `rescale_adapter_scale`"
            raise LoraFxError((Diagnostic("cannot-merge", message, help=help),))
        return super()._merged_with(chosen, safe, progressbar, dequantize)

    def unload(self) -> nn.Module:
        """Make this model the plain one that it was, see `MergeMethods`; not while it is scaled."""
        if any(site.lora_multiplier != 1 for _, site in storage.sites(self)):
            message = "scalings are multiplied for a while, which ends in the compiled model"
            help = "unload outside of `rescale_adapter_scale`"
            raise LoraFxError((Diagnostic("cannot-rescale", message, help=help),))
        return super().unload()

    def _multiplied(self, multiplier: float) -> list[tuple[storage.Site, float]]:
        before = [(site, site.lora_multiplier) for _, site in storage.sites(self)]
        for site, value in before:
            site.lora_multiplier = value * multiplier
        self._activate()
        return before

    def _unscalable(self, multiplier: object) -> Iterator[Diagnostic]:
        if not isinstance(multiplier, int | float) or not math.isfinite(multiplier):
            yield Diagnostic("cannot-rescale", f"`{multiplier}` is no finite number")
        for fqn, site in storage.sites(self):
            change = site.lora_change
            if change is not None and site.lora_branches[change.adapter].magnitude is not None:
                message = f"`{change.adapter}` has norms of `{fqn}`, whose weight it has changed"
                help = "save it, and load the folder over the base: that is LoRA as any other"
                yield Diagnostic("cannot-rescale", message, help=help)
