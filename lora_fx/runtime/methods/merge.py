"""Adapters folded into the weights of a compiled model, and out of them again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_fx.adapters import storage
from lora_fx.adapters.bind import require_compatible
from lora_fx.adapters.undo import undone_on_error
from lora_fx.adapters.weights import merged
from lora_fx.adapters.weights.changed_weight import restore
from lora_fx.adapters.weights.mergeable import require_mergeable, require_variants
from lora_fx.adapters.weights.merged import Merged
from lora_fx.plan.packed import packing_of, plain_dtype
from lora_fx.runtime.merging.tensors import merged_tensors, require_finite
from lora_fx.runtime.methods.adapters import AdapterMethods
from lora_fx.runtime.quantization_config import announce_plain
from lora_fx.runtime.unload import (
    put_for_good,
    require_unloadable,
    strip,
    unpack_for_good,
    untie,
    with_rows,
)

_MERGED = ("lora", "dora", "bdlora", "velora", "kasa", "monteclora")  # variants


class MergeMethods(AdapterMethods):
    """Mixin for the root of a compiled model: PEFT's names.

    A merged adapter takes part as if it were active, and its products cost nothing: they are in
    the weights. What it trained of the base itself, copies of modules, biases and rows, is in
    force as that of an active one is. Active adapters that are not merged add up with it.
    """

    def merge_adapter(
        self,
        adapter_names: str | Sequence[str] | None = None,
        safe_merge: bool = True,
        progressbar: bool = False,
    ) -> None:
        """Fold adapters into the weights, by default the active ones; others stay merged.

        W' = W + Σ s B A, for all merged adapters as they are now, computed in the widest dtype of
        all and at least float32, and rounded once. W is kept beside W': `unmerge_adapter` puts it
        back bit for bit. Training then leaves merged adapters as they are.

        Raises LoraFxError, with nothing changed, for weights that cannot be merged into (shared,
        offloaded, packed), and, with `safe_merge`, if any of the results is not finite.
        """
        chosen = self._chosen(adapter_names)
        results = self._merged_with(chosen, safe_merge, progressbar)
        with undone_on_error(self):
            self._fold(results, chosen)

    def unmerge_adapter(self) -> None:
        """Put the weights back that were there before any adapter was merged: the very tensors."""
        with undone_on_error(self):
            self._unfold()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: str | Sequence[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """Make this model a plain one of its original class, with adapters in its weights.

        They are those that are merged and the given ones, by default the active. Modules, biases
        and rows that they trained stand in the place of the base's; if input and output embeddings
        differ then, the config says that they are not tied. The model that was compiled keeps its
        weights. Nothing of lora_fx is left: `save_pretrained` writes a model. Returns it.

        With `dequantize` layers in 4 or 8 bits that adapters are merged into become plain ones, in
        the dtype that the model is in elsewhere; other layers stay packed, and the config says so.

        Raises LoraFxError as `merge_adapter` does, with nothing changed.
        """
        chosen = self._chosen(adapter_names)
        names = self._together(chosen)
        require_unloadable(self, names)
        with undone_on_error(self):
            self.lora_fx_active, self.lora_fx_enabled = (), True
            merged.drop(self)
            _restore(self, names, dequantize)
            results = self._merged_with(names, safe_merge, progressbar, dequantize)
            unpack_for_good(results)
            self._fold(results, names)
            rows = with_rows(self, names)
            if safe_merge:
                require_finite(self, rows)
            put_for_good(rows)
            untie(self)
            strip(self)
            announce_plain(self)
        return self

    def unload(self) -> nn.Module:
        """Make this model the plain one that it was: adapters, merged or not, are left out.

        Modules, biases and rows are the base's own again, bit for bit; weights that an init has
        changed to rounding. Returns it.
        """
        with undone_on_error(self):
            self.lora_fx_active = ()
            self._unfold()
            _restore(self, ())
            strip(self)
        return self

    def merged_adapters(self) -> list[str]:
        """Return the adapters that are folded into the weights."""
        return list(self.lora_fx_merged)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load by name; refused while adapters are merged, whose values would go astray.

        Tokens are routed by the adapters' values, and mixed batches with the tensors, as they are
        then.
        """
        self._require_unmerged(self.lora_fx_merged)
        result = super().load_state_dict(*args, **kwargs)
        self._route_own()
        if self._arrow() is not None:
            self._activate()
        return result

    def _chosen(self, names: str | Sequence[str] | None) -> tuple[str, ...]:
        self._require_no_arrow()
        if names is None:
            return self.lora_fx_active
        chosen = (names,) if isinstance(names, str) else tuple(names)
        self._require_known(chosen)
        return chosen

    def _merged_with(
        self, chosen: tuple[str, ...], safe: bool, progressbar: bool, dequantize: bool = False
    ) -> Merged:
        """Compute what all tensors are with these adapters and those that are merged in them."""
        names = self._together(chosen)
        require_variants((self.lora_fx_adapters[name] for name in names), _MERGED)
        require_mergeable(self, names, dequantize)
        require_compatible(self, self.lora_fx_active, names)
        results = merged_tensors(self, names, progressbar)
        if safe:
            require_finite(self, results)
        return results

    def _together(self, chosen: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.lora_fx_merged, *chosen)))

    def _fold(self, results: Merged, chosen: tuple[str, ...]) -> None:
        merged.drop(self)
        merged.keep(results)
        self._set_merged(self._together(chosen))

    def _unfold(self) -> None:
        merged.drop(self)
        self._set_merged(())

    def _set_merged(self, names: tuple[str, ...]) -> None:
        self.lora_fx_merged = names
        self.lora_fx_watched = set()
        self._switch()


def _restore(model: nn.Module, kept: tuple[str, ...], dequantize: bool = False) -> None:
    """Put back what the inits of all adapters but these have taken out of weights.

    With `dequantize` what is in 4 or 8 bits, and is merged into, is not packed once more.
    """
    for _, site in storage.sites(model):
        if site.lora_change is not None and site.lora_change.adapter not in kept:
            merged_into = any(name in site.lora_branches for name in kept)
            plain = dequantize and merged_into and packing_of(site) is not None
            restore(site, (plain_dtype(model) or torch.float32) if plain else None)
