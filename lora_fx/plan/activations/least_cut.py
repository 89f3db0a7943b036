"""What a compiled region keeps for its backward pass: the least from which the rest is computed.

torch's partitioner keeps the tensors of a minimal cut between what is not computed again (inputs,
and results of matrix products and attention) and what the backward pass needs, weighed by their
bytes; elementwise results and reductions behind the cut are computed again. An operand of a product
that the backward pass multiplies again has to lie in memory, and is kept. Equal casts are one.
"""

from collections.abc import Iterator
from typing import Any

import networkx as nx
import torch
from torch import Tensor, UntypedStorage
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Storages = dict[int, UntypedStorage]
_aten = torch.ops.aten
_DEAR = frozenset({
    _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.embedding,
    _aten.empty_like, _aten.new_empty, _aten.empty,  # what a stand-in for a fused kernel returns
})  # fmt: skip
_SOURCE, _SINK = "given", "needed"


class Region:
    """The operations of one compiled region, and which of their tensors the backward pass needs."""

    def __init__(self) -> None:
        self.needed: Storages = {}
        self._sizes: dict[int, int] = {}
        self._edges: set[tuple[int, int]] = set()
        self._dear: set[int] = set()
        self._operands: set[int] = set()
        self._casts: dict[tuple[int, int], int] = {}  # the first of each storage to each size
        self._same: dict[int, int] = {}  # a later cast by the first one
        self._alive: list[UntypedStorage] = []  # an identity is that of a storage that is alive

    def add(self, function: Any, inputs: Storages, outputs: Storages) -> None:
        """Record an operation: what it reads, the weights aside, and what it makes."""
        inputs = {self._same.get(key, key): storage for key, storage in inputs.items()}
        for key, storage in (inputs | outputs).items():
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self._alive.append(storage)
                if key in inputs:
                    self._dear.add(key)
        if getattr(function, "overloadpacket", None) in _DEAR:
            self._operands |= inputs.keys()
            self._dear |= outputs.keys() - inputs.keys()
        else:
            self._edges |= {(i, o) for i in inputs for o in outputs if o not in inputs}
        if function is _aten._to_copy.default:
            for before, after in zip(inputs, outputs, strict=False):
                first = self._casts.setdefault((before, self._sizes[after]), after)
                self._same[after] = first

    def need(self, storages: Storages) -> None:
        """Record what the backward pass needs."""
        storages = {self._same.get(key, key): storage for key, storage in storages.items()}
        self.needed |= storages
        for key in storages.keys() - self._sizes.keys():
            self._sizes[key] = storages[key].nbytes()
            self._dear.add(key)

    def kept(self) -> Storages:
        """Return the storages of a minimal cut."""
        graph = nx.DiGraph()
        for key, size in self._sizes.items():
            graph.add_edge(("in", key), ("out", key), capacity=size)
        for before, after in self._edges:
            graph.add_edge(("out", before), ("in", after))
        banned = self._operands & self.needed.keys()
        for key in self._dear | banned:
            graph.add_edge(_SOURCE, ("in", key))
        for key in self.needed:
            graph.add_edge(("out", key), _SINK)
        if not self.needed or _SOURCE not in graph:
            return {}
        _, (given, _) = nx.minimum_cut(graph, _SOURCE, _SINK)
        cut = {key for key in self._sizes if ("in", key) in given and ("out", key) not in given}
        every = {id(storage): storage for storage in self._alive} | self.needed
        return {key: every[key] for key in cut}


class Recording(TorchDispatchMode):
    """Record the operations of the region that runs; `own` are storages that are there anyway."""

    def __init__(self, own: Storages) -> None:
        super().__init__()
        self.region: Region | None = None
        self._own = own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        result = func(*args, **(kwargs or {}))
        if self.region is not None:
            inputs, outputs = ({id(s): s for s in _storages(x)} for x in ((args, kwargs), result))
            for key in self._own:
                inputs.pop(key, None)
                outputs.pop(key, None)
            self.region.add(func, inputs, outputs)
        return result


def _storages(values: Any) -> Iterator[UntypedStorage]:
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
