"""The names that a model's tensors have in its checkpoint, and which part of a tensor each is.

transformers keeps some checkpoints in another form than the model: experts one by one where the
model has them stacked, `gate` and `up` apart where it has them in one matrix, other names. Which,
its own conversion says: it is run here on tensors without data, and what it cuts is read off.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True)
class Part:
    """A part of the tensor `fqn` of a model, as `torch.as_strided` describes one."""

    fqn: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    whole: bool

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part of a contiguous tensor that has the shape of the whole one."""
        return tensor.as_strided(self.shape, self.stride, self.start)

    def within(self, elements: int) -> tuple[int, "Part"] | None:
        """Return in which of equal blocks of so many elements it lies, and where there.

        None if it lies in several.
        """
        block, start = divmod(self.start, elements)
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if start + reach >= elements:
            return None
        return block, Part(self.fqn, self.shape, self.stride, start, False)


def stored_parts(tree: nn.Module, names: Iterable[str]) -> dict[str, Part]:
    """Return which part of a model's tensors each of these tensors of its checkpoint is.

    Names may be those that transformers gives them, or the model's own; the prefix of the model
    beneath a head may be there or not. What is none of the model's, or is made of several of its
    tensors, is left out.
    """
    own = {name: _part(name, tensor, tensor) for name, tensor in _without_data(tree).items()}
    known = own | _as_transformers_stores(tree)
    prefix = f"{getattr(tree, 'base_model_prefix', '')}."
    found = {}
    for name in names:
        forms = (name, f"{prefix}{name}", name.removeprefix(prefix))
        part = next((known[form] for form in forms if form in known), None)
        if part is not None:
            found[name] = part
    return found


def _without_data(tree: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tree.state_dict().items()
    }


def _as_transformers_stores(tree: nn.Module) -> dict[str, Part]:
    if not isinstance(tree, PreTrainedModel):
        return {}
    tensors = _without_data(tree)
    with _Views():
        stored = revert_weight_conversion(tree, dict(tensors))
    owners = {id(tensor.untyped_storage()): name for name, tensor in tensors.items()}
    owned = {name: owners.get(id(tensor.untyped_storage())) for name, tensor in stored.items()}
    return {
        name: _part(fqn, stored[name], tensors[fqn])
        for name, fqn in owned.items()
        if fqn is not None
    }


def _part(fqn: str, tensor: Tensor, of: Tensor) -> Part:
    start = int(tensor.storage_offset())
    whole = tensor.stride() == of.stride() and tensor.shape == of.shape and start == 0
    return Part(fqn, tuple(tensor.shape), tensor.stride(), start, whole)


class _Views(TorchDispatchMode):
    """Makes no copies: what would be one is the tensor itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return args[0]
        return func(*args, **(kwargs or {}))
