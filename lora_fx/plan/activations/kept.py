"""What autograd keeps of a forward for the backward pass."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from lora_fx.plan.activations.least_cut import Recording, Region, Storages


class Kept:
    """The distinct storages that a forward keeps, those of the model itself aside.

    `outside` are kept outside the layers; `layers[i]` in layer i, whose `inputs[i]` are what would
    be kept of it if it were computed again in the backward pass. With `compiled`, of a layer only
    what a compiled one keeps.
    """

    def __init__(self, tree: nn.Module, layers: Sequence[nn.Module], compiled: bool) -> None:
        self.outside: Storages = {}
        self.layers: list[Storages] = [{} for _ in layers]
        self.inputs: list[Storages] = [{} for _ in layers]
        self._modules = layers
        self._own = _storages([*tree.parameters(), *tree.buffers()])
        self._here = self.outside
        self._recording = Recording(self._own)
        self._compiled = compiled

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward that runs inside."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._modules):
                stack.enter_context(self._around(layer, index))
            stack.enter_context(self._recording)
            stack.enter_context(saved_tensors_hooks(self._keep, _never))
            yield

    @contextmanager
    def _around(self, layer: nn.Module, index: int) -> Iterator[None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._begin(self.layers[index])
            given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_new(leaf)]
            self.inputs[index].update(_storages(given))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._end()

        handles = (
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave),
        )
        yield
        for handle in handles:
            handle.remove()

    @contextmanager
    def of_one_region(self) -> Iterator[None]:
        """Record what runs inside as compiled together, outside the layers."""
        self._begin(self.outside)
        yield
        self._end()

    def _begin(self, here: Storages) -> None:
        self._here = here
        self._recording.region = Region() if self._compiled else None

    def _end(self) -> None:
        if self._recording.region is not None:
            self._here.update(self._recording.region.kept())
        self._here, self._recording.region = self.outside, None

    def _keep(self, tensor: Tensor) -> Tensor:
        if _is_new(tensor):
            new = _storages([tensor])
            if new.keys() & self._own.keys():
                return tensor
            if self._recording.region is None:
                self._here.update(new)
            else:
                self._recording.region.need(new)
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
