"""A model's modules as selectors see them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from lora_fx.plan.stacks import Place, Stack, every_stack, place_of


@dataclass(frozen=True)
class Modules:
    """Modules by fqn, in module order, each once; `aliases` are all names of each, shared ones too.

    `linears` are the linear layers but the output head, `config` is the model's, or None.
    """

    by_fqn: Mapping[str, nn.Module]
    aliases: Mapping[str, tuple[str, ...]]
    stacks: tuple[Stack, ...]
    linears: frozenset[str]
    config: Any

    def place(self, fqn: str) -> Place | None:
        """Return the layer that a module stands in, None outside every stack."""
        return place_of(fqn, self.stacks)


def modules_of(model: nn.Module) -> Modules:
    """Return the modules of a model, without what stands inside its linear layers (adapters)."""
    names: dict[int, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(fqn)
    by_fqn = _outside_linears(model)
    return Modules(
        by_fqn,
        {fqn: tuple(names[id(module)]) for fqn, module in by_fqn.items()},
        tuple(every_stack(model)),
        linear_modules(model),
        getattr(model, "config", None),
    )


def linear_modules(model: nn.Module) -> frozenset[str]:
    """Return the fqns of all linear layers but the output head (PEFT's `all-linear`)."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return frozenset(
        fqn
        for fqn, module in _outside_linears(model).items()
        if isinstance(module, nn.Linear) and module is not head
    )


def can_be_adapted(module: nn.Module) -> bool:
    """Whether a module is a linear layer that is called.

    `nn.MultiheadAttention` reads the weight of its output projection and never calls it.
    """
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _outside_linears(model: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    inside = ""
    for fqn, module in model.named_modules():
        if not fqn or (inside and fqn.startswith(inside)):
            continue
        found[fqn] = module
        if isinstance(module, nn.Linear):
            inside = f"{fqn}."
    return found
