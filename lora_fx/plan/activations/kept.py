"""What autograd keeps of a forward for the backward pass."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

Storages = dict[int, UntypedStorage]


class Kept:
    """The distinct storages that a forward keeps, those of the model itself aside.

    `outside` are kept outside the layers; `layers[i]` in layer i, whose `inputs[i]` are what would
    be kept of it if it were computed again in the backward pass.
    """

    def __init__(self, tree: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.outside: Storages = {}
        self.layers: list[Storages] = [{} for _ in layers]
        self.inputs: list[Storages] = [{} for _ in layers]
        self._modules = layers
        self._own = _storages([*tree.parameters(), *tree.buffers()])
        self._here = self.outside

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward that runs inside."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._modules):
                stack.enter_context(self._around(layer, index))
            stack.enter_context(saved_tensors_hooks(self._keep, _never))
            yield

    @contextmanager
    def _around(self, layer: nn.Module, index: int) -> Iterator[None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._here = self.layers[index]
            given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_new(leaf)]
            self.inputs[index].update(_storages(given))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._here = self.outside

        handles = (
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave),
        )
        yield
        for handle in handles:
            handle.remove()

    def _keep(self, tensor: Tensor) -> Tensor:
        if _is_new(tensor):
            new = _storages([tensor])
            if not new.keys() & self._own.keys():
                self._here.update(new)
        return tensor

    def bytes(self) -> int:
        """Bytes of everything."""
        return _bytes(self.outside, *self.layers)

    def bytes_with_recomputed_layers(self) -> int:
        """Bytes if of each layer only the inputs are kept, while one layer's are there again."""
        inputs = [given for given, kept in zip(self.inputs, self.layers, strict=True) if kept]
        return max(
            (_bytes(self.outside, *inputs, layer) for layer in self.layers),
            default=_bytes(self.outside),
        )


def _is_new(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _storages(tensors: Sequence[Tensor]) -> Storages:
    """Return storages by identity; holding them keeps the identity theirs."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {id(storage): storage for storage in storages}


def _bytes(*storages: Storages) -> int:
    union = {key: storage for some in storages for key, storage in some.items()}
    return sum(storage.nbytes() for storage in union.values())


def _never(tensor: Tensor) -> Tensor:
    raise AssertionError("nothing runs backward on meta tensors")
