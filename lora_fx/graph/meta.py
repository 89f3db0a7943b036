"""Run a model's Python on meta tensors, up to the place that is to be captured."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class PlainText(TorchFunctionMode):
    """Answer questions about values that meta tensors do not have as for plain text: yes.

    transformers asks two on its way to the layers: is nothing packed, is nothing padded?
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Let `bool(tensor)` of a meta tensor be True; everything else as usual."""
        if func is Tensor.__bool__ and args[0].device == torch.device("meta"):
            return True
        return func(*args, **(kwargs or {}))
