"""The factors of all slots at a linear layer in one tensor each, of which theirs are views.

A graph that computes mixed batches so has two inputs for all of them, whatever their number.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lora_fx.adapters.sites.factors import Factors


class SlotStack(nn.Module):
    """A (N, r, in) and B (N, out, r), whose parts are the factors of the slots, in one memory.

    What is written into a factor is in the stack. Neither is trained.
    """

    A: Tensor
    B: Tensor

    def __init__(self, slots: Sequence[Factors]) -> None:
        super().__init__()
        self.slots = tuple(slots)
        self.gather()
        self.register_load_state_dict_post_hook(_settle)

    def gather(self) -> None:
        """Take the factors as they are, and let them be views of that, in place."""
        with torch.no_grad():
            A = torch.stack([slot.A.weight for slot in self.slots])
            B = torch.stack([slot.B.weight for slot in self.slots])
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        for slot, own_A, own_B in zip(self.slots, A, B, strict=True):
            slot.A.weight.data, slot.B.weight.data = own_A, own_B

    def settle(self) -> bool:
        """Take the factors anew if they have been moved meanwhile, in place.

        Return whether they are here: what shards parameters (FSDP2) has put other tensors there.
        """
        factors = (factor for slot in self.slots for factor in (slot.A, slot.B))
        if any(type(factor.weight.data) is not Tensor for factor in factors):
            return False
        if not self._is_shared():
            self.gather()
        return True

    def note_change(self) -> None:
        """Let a backward pass that needs what was in the slots until now fail, not go wrong."""
        increment_version([one for one in (self.A, self.B) if not one.is_inference()])

    def _is_shared(self) -> bool:
        sizes = self.A[0].numel(), self.B[0].numel()
        return all(
            factor.weight.data_ptr() == whole.data_ptr() + i * size * whole.element_size()
            for i, slot in enumerate(self.slots)
            for factor, whole, size in zip((slot.A, slot.B), (self.A, self.B), sizes, strict=True)
        )


def _settle(stack: SlotStack, _: object) -> None:
    stack.settle()


def can_be_stacked(slots: Sequence[Factors]) -> bool:
    """Whether the slots at a module are two plain factors each."""
    return len(slots) > 1 and not any(
        slot.tied or slot.has_bias or slot.magnitude is not None or slot.diagonal is not None
        for slot in slots
    )
