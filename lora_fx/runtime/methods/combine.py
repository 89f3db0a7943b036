"""New adapters made of those that are there, on a compiled model."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from lora_fx.adapters.combine.combine import Combined, combined
from lora_fx.adapters.combine.operators import Method
from lora_fx.adapters.combine.recipe import Recipe
from lora_fx.adapters.undo import undone_on_error
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.runtime.methods.checks import check_name
from lora_fx.runtime.methods.live import LiveMethods

_PLAIN = ("cat", "linear", "svd")
_OPERATORS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = (*_PLAIN, *_OPERATORS, *(f"{name}_svd" for name in _OPERATORS))


class CombineMethods(LiveMethods):
    """Mixin for the root of a compiled model."""

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
        seed: int = 0,
        cross_terms: bool = False,
    ) -> None:
        """Add the weighted combination of adapters as an adapter, not active and not trained.

        The arguments are PEFT's. `cat` and `linear` are the exact sum Σ wᵢ sᵢ Bᵢ Aᵢ, `cat` of the
        sum of the ranks and `linear` of no more than a layer has room for; `svd` is the best of
        rank `svd_rank` (by default the largest of the ranks) to it; the others are in
        `adapters/combine/`. PEFT's `linear` sums A and B by themselves, so that products of Bᵢ and
        Aⱼ are in it: `cross_terms` asks for that. Whatever the adapters' scalings, that of the new
        one is 1. Of DoRA adapters it is one too, and exactly W + Σ wᵢ (Wᵢ − W). Biases of B are
        summed; of copies, biases and rows what they change of the base is. `seed` says what `dare`
        drops. Weight 1 of one adapter is that adapter.

        Raises LoraFxError, with nothing changed, for unknown adapters, a name that is taken, and
        what cannot be combined.
        """
        self._require_known(tuple(adapters))
        check_name(adapter_name)
        faults = list(
            _argument_faults(adapters, weights, combination_type, density, majority_sign_method)
        )
        if adapter_name in self.lora_fx_adapters:
            message = f"there is an adapter `{adapter_name}` already"
            help = f'call `delete_adapter("{adapter_name}")` first, or choose another name'
            faults.append(Diagnostic("adapter-exists", message, help=help))
        if svd_rank is not None and not combination_type.endswith("svd"):
            message = f"`{combination_type}` takes no `svd_rank`"
            faults.append(Diagnostic("cannot-combine", message, help='combine by "svd"'))
        if cross_terms and combination_type != "linear":
            message = f"`{combination_type}` takes no `cross_terms`"
            faults.append(Diagnostic("cannot-combine", message, help='they are of "linear"'))
        if faults:
            raise LoraFxError(faults)
        share = 1.0 if density is None else density
        method = Method(combination_type, share, majority_sign_method, cross_terms)
        self._add_combined(
            adapter_name,
            dict(zip(adapters, weights, strict=True)),
            Recipe(method, svd_rank, svd_clamp, seed),
        )

    def _add_combined(self, name: str, weights: dict[str, float], recipe: Recipe) -> None:
        mix = [(self.lora_fx_adapters[adapter], weight) for adapter, weight in weights.items()]
        self._add(combined(self, name, mix, recipe))

    def _add(self, new: Combined) -> None:
        self._require_rank(new.plan)
        with undone_on_error(self):
            new.bind(self)
            self.lora_fx_adapters = {**self.lora_fx_adapters, new.plan.name: new.plan}
            self._activate()


def _argument_faults(
    adapters: Sequence[str],
    weights: Sequence[float],
    method: str,
    density: float | None,
    sign: str,
) -> Iterator[Diagnostic]:
    messages = []
    if len(adapters) != len(weights) or not adapters:
        messages.append(f"{len(adapters)} adapters and {len(weights)} weights; each needs one")
    if len(set(adapters)) < len(adapters):
        messages.append("an adapter is named twice")
    if not all(math.isfinite(weight) for weight in weights):
        messages.append("a weight must be a finite number")
    if method not in METHODS:
        messages.append(f"there is no `{method}`; there are {', '.join(METHODS)}")
    elif method not in _PLAIN and (density is None or not 0 <= density <= 1):
        messages.append(f"`{method}` needs a `density` between 0 and 1")
    elif method in _PLAIN and density is not None:
        messages.append(f"`{method}` takes no `density`")
    if sign not in ("total", "frequency"):
        messages.append("`majority_sign_method` is `total` or `frequency`")
    yield from (Diagnostic("cannot-combine", message) for message in messages)
