"""Which tensors of a site get gradients."""

from collections.abc import Sequence

from lora_fx.plan.sites import SitePlan
from lora_fx.spec.spec import OptimizerSpec


def tensors_with_gradients(site: SitePlan, optimizer: OptimizerSpec | None) -> Sequence[str]:
    """Return the names of the tensors that the optimizer changes.

    `lora_fa` leaves A as it is (Zhang et al. 2023, LoRA-FA, arXiv 2308.03303, §3).
    """
    if not site.trainable:
        return ()
    keeps_a = optimizer is not None and optimizer.name == "lora_fa"
    return [
        name for name in site.tensors if name not in site.frozen and not (keeps_a and "_A" in name)
    ]
