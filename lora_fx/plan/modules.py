"""A model's modules and parameters as selectors see them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_fx.plan.kinds import Layer, is_linear, layer_of, parameter_layer
from lora_fx.plan.stacks import Place, Stack, every_stack, place_of


@dataclass(frozen=True)
class Modules:
    """Modules by fqn, in module order, each once; `aliases` are all names of each, shared ones too.

    `parameters` are the base model's by name. `linears` are the linear layers but the output head,
    `config` is the model's, or None.
    """

    tree: nn.Module
    by_fqn: Mapping[str, nn.Module]
    aliases: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, Tensor]
    stacks: tuple[Stack, ...]
    linears: frozenset[str]
    config: Any

    def place(self, name: str) -> Place | None:
        """Return the layer that a module or parameter stands in, None outside every stack."""
        return place_of(name, self.stacks)

    def owner(self, name: str) -> nn.Module:
        """Return a module, or the module of a parameter, by its dotted name."""
        return self.by_fqn.get(name) or self.tree.get_submodule(name.rpartition(".")[0])

    def layer(self, name: str) -> Layer | None:
        """Return what can be adapted under a name, of a module or of a parameter."""
        if name in self.by_fqn:
            return layer_of(self.by_fqn[name])
        return parameter_layer(self.owner(name), self.parameters[name])


def modules_of(model: nn.Module) -> Modules:
    """Return the modules of a model, without what adapters keep inside them."""
    names: dict[int, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(fqn)
    by_fqn = {fqn: module for fqn, module in outside_adapters(model) if fqn}
    return Modules(
        model,
        by_fqn,
        {fqn: tuple(names[id(module)]) for fqn, module in by_fqn.items()},
        {
            f"{fqn}.{name}" if fqn else name: parameter
            for fqn, module in ({"": model} | by_fqn).items()
            for name, parameter in module.named_parameters(recurse=False)
        },
        tuple(every_stack(model)),
        linear_modules(model),
        getattr(model, "config", None),
    )


def input_embedding(model: Any) -> nn.Module | None:
    """Return what a model says its inputs enter by; an image model may say nothing."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def linear_modules(model: nn.Module) -> frozenset[str]:
    """Return the fqns of all linear layers but the output head (PEFT's `all-linear`)."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return frozenset(
        fqn
        for fqn, module in outside_adapters(model)
        if fqn and is_linear(module) and module is not head
    )


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules, the model first, as `named_modules` does, but not what adapters keep inside.

    They are those of the moment of the call. What is looked at does not grow with the number of
    adapters.
    """
    found = {model: ""}
    _add_below(model, "", found)
    return iter([(fqn, module) for module, fqn in found.items()])


def _add_below(module: nn.Module, prefix: str, found: dict[nn.Module, str]) -> None:
    for name, child in module._modules.items():
        if child is not None and child not in found and not name.startswith("lora_"):
            found[child] = fqn = prefix + name
            _add_below(child, f"{fqn}.", found)
