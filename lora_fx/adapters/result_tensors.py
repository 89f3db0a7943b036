"""The tensors of what a module returned."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def result_tensors(result: Any) -> Iterator[Tensor]:
    """Yield them, also out of objects that torch knows no parts of: a dataclass's fields."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type):
            yield from (t for t in tree_leaves(vars(leaf)) if isinstance(t, Tensor))
