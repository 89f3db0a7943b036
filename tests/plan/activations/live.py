"""Bytes of tensors that are alive, by looking at the storages themselves."""

from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Watch every storage that an operator makes, in forward and backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        own = (*model.parameters(), *model.buffers())
        self._own = {StorageWeakRef(tensor.untyped_storage()) for tensor in own}
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference not in self._own:
                    self._made[reference] = storage.nbytes()
        return result

    def bytes(self) -> int:
        """Of those that are alive."""
        return sum(size for reference, size in self._made.items() if not reference.expired())
