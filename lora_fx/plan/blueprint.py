"""What a model can be built from again, without its weights."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Blueprint:
    """The class and the config of a model, layers replicated, and the dtype of its weights."""

    model: type[PreTrainedModel]
    config: PretrainedConfig
    dtype: torch.dtype

    def build(self) -> PreTrainedModel:
        """Build the model on the meta device."""
        with building_on_meta(self.dtype):
            return self.model(copy.deepcopy(self.config))


def blueprint_of(tree: nn.Module) -> Blueprint | None:
    """Return what builds a module tree again; None if it is no `PreTrainedModel`."""
    if not isinstance(tree, PreTrainedModel):
        return None
    dtypes = Counter(p.dtype for p in tree.parameters() if p.is_floating_point())
    dtype = dtypes.most_common(1)[0][0] if dtypes else torch.float32
    return Blueprint(type(tree), copy.deepcopy(tree.config), dtype)


@contextmanager
def building_on_meta(dtype: torch.dtype | None) -> Iterator[None]:
    """Make new parameters meta tensors of a dtype, float32 if it is None."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)
