"""Bytes of an optimizer's state."""

from lora_fx.spec.spec import OptimizerSpec

_EIGHT_BIT_FROM = 4096
_BLOCK = 256


def state_bytes(elements: int, width: int, optimizer: OptimizerSpec | None) -> int:
    """Return the bytes of state for one trained tensor whose elements are `width` bytes wide.

    AdamW keeps two moments in the parameter's dtype, SGD one with momentum. bitsandbytes' 8-bit
    AdamW keeps a byte a moment and a float32 scale for each block of 256, of tensors of 4096
    elements and more; of smaller ones float32 moments (Dettmers et al. 2022, arXiv 2110.02861, §2).
    """
    name = optimizer.name if optimizer is not None else "adamw"
    match name:
        case "adamw8bit" | "paged_adamw8bit":
            if elements < _EIGHT_BIT_FROM:
                return 2 * 4 * elements
            return 2 * (elements + 4 * -(-elements // _BLOCK))
        case "sgd":
            return elements * width if optimizer is not None and optimizer.momentum else 0
        case _:
            return 2 * elements * width
