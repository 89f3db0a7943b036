"""LoRA-FA: B alone is trained, by the gradient of the weight as far as the frozen A can hold it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lora_fx.adapters import storage
from lora_fx.adapters.sites.site import Site
from lora_fx.graph.exact import exact_products


@dataclass
class Pair:
    """A (r, in), frozen, and the B (out, r) that is trained, of one adapter at one site."""

    site: Site
    adapter: str
    B: nn.Parameter
    _inverses: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)

    def gradient(self) -> Tensor | None:
        """Return the gradient of B that AdamW sees.

        X minimises ‖s X A − ∂L/∂W‖ (Wang et al. 2024, LoRA-Pro, arXiv 2407.18242, §2, for a fixed
        A): X = (∂L/∂W) Aᵀ (A Aᵀ)⁻¹ / s = (∂L/∂B) (A Aᵀ)⁻¹ / s², in at least float32. Of an adapter
        that has been deleted it is what autograd wrote.
        """
        branch = self.site.lora_branches.get(self.adapter)
        if self.B.grad is None or branch is None or branch.B.weight is not self.B:
            return self.B.grad
        scaling = self.site.lora_arithmetic[self.adapter].scaling
        if scaling == 0:
            return self.B.grad
        gradient = self.B.grad.to(torch.promote_types(self.B.dtype, torch.float32))
        return (gradient @ self._inverted(gradient.dtype) / scaling**2).to(self.B.dtype)

    @exact_products()
    def _inverted(self, dtype: torch.dtype) -> Tensor:
        """Return the pseudo-inverse of A Aᵀ (r, r), which is kept until A is another one."""
        A = self.site.lora_branches[self.adapter].A.weight
        known = id(A), A._version
        if known not in self._inverses:
            wide = A.detach().to(dtype)
            self._inverses = {known: torch.linalg.pinv(wide @ wide.t(), hermitian=True)}
        return self._inverses[known]


def pairs(model: nn.Module) -> list[Pair]:
    """Return the pairs of all adapters whose B is trained."""
    return [
        Pair(site, adapter, branch.B.weight)  # type: ignore[arg-type]
        for _, site in storage.sites(model)
        for adapter, branch in site.lora_branches.items()
        if not branch.tied and branch.B.weight.requires_grad
    ]


class LoraFA(AdamW):
    """AdamW whose gradients of B are those of `Pair`, and as they are of all other parameters.

    Zhang et al. 2023, LoRA-FA, arXiv 2308.03303, §3; PEFT's `create_lorafa_optimizer`. What is left
    in `grad` after a step is what autograd wrote there.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], pairs: list[Pair], **settings: Any
    ) -> None:
        super().__init__(groups, **settings)
        self._pairs = pairs

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; `closure` computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        written = [(pair.B, pair.B.grad) for pair in self._pairs]
        try:
            for pair in self._pairs:
                pair.B.grad = pair.gradient()
            _without_hooks(AdamW.step)(self)
        finally:
            for parameter, gradient in written:
                parameter.grad = gradient
        return loss


def _without_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a class's own step; torch wraps that of each class that it makes an optimizer of."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
