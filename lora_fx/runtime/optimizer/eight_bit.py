"""bitsandbytes' 8-bit AdamW, whose groups say for themselves how many bits they keep."""

from typing import Any

from bitsandbytes.optim import adamw


class _BitsOfGroups:
    """Mixin: moments of a group with `optim_bits` 32 stay as they are (arXiv 2110.02861, §2.3).

    bitsandbytes keeps such exceptions for the whole process, by the parameters' addresses.
    """

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Return how a parameter is stepped."""
        config = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        return config | {"optim_bits": group["optim_bits"]}


class AdamW8bit(_BitsOfGroups, adamw.AdamW8bit):
    """AdamW with moments of 8 bits."""


class PagedAdamW8bit(_BitsOfGroups, adamw.PagedAdamW8bit):
    """AdamW with moments of 8 bits, in memory that a GPU pages out to the CPU."""
