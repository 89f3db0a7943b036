"""A PEFT config as a spec, read on the model it is for."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.modules import Modules, input_embedding, modules_of
from lora_fx.plan.replication import replicate_layers
from lora_fx.plan.selectors import select
from lora_fx.plan.skeleton import ModelLike, structure_of, tree_of
from lora_fx.spec import parse
from lora_fx.spec.peft.config import PeftConfig
from lora_fx.spec.peft.model import Selection
from lora_fx.spec.peft.read import read_config
from lora_fx.spec.peft.text import head, to_text
from lora_fx.spec.spec import Spec


def from_peft(config: Any, model: ModelLike | None = None) -> Spec:
    """Return the spec that plans to the sites, ranks and scales that PEFT makes of a config.

    `config` is a `LoraConfig`, a dict, an `adapter_config.json` or a folder that holds one.
    `model` is a live model, a config, a folder, a `config.json` or a hub id. With it the spec says
    just what PEFT does to that model; without it PEFT's names of modules are taken as they are
    meant, and a config that leaves its targets to PEFT is read for its
    `base_model_name_or_path`. Raises LoraFxError with everything that the language cannot say.
    """
    return parse(peft_text(config, model))


def from_peft_as_named(config: Mapping[str, Any], model: nn.Module) -> Spec:
    """Return the spec of a config whose names are those of the model's own modules.

    PEFT, on models whose experts are stacked now, takes some for the names that these had.
    """
    given = read_config(config)
    named = _NamedModel(_tree(given, model))
    named.type = None
    return parse(to_text(given, named))


def peft_text(config: Any, model: ModelLike | None = None) -> str:
    """Return the text of `from_peft`'s spec."""
    given = config if isinstance(config, PeftConfig) else read_config(config)
    if model is None and not given.asks_for_its_model:
        return to_text(given)
    return to_text(given, _NamedModel(_tree(given, model)))


def _tree(config: PeftConfig, model: ModelLike | None) -> nn.Module:
    spec = parse(head(config))
    tree = tree_of(model, spec)
    if spec.layers is not None:
        tree = structure_of(tree)
        replicate_layers(tree, spec.layers)
    return tree


def _embedding(tree: Any, modules: Modules) -> tuple[str | None, frozenset[str]]:
    """Return the input embedding's name, and those of the modules that share its weight."""
    layer = input_embedding(tree)
    names = [fqn for fqn, module in modules.by_fqn.items() if module is layer]
    weight = getattr(layer, "weight", None)
    tied = (
        fqn
        for fqn, module in modules.by_fqn.items()
        if weight is not None and getattr(module, "weight", None) is weight
    )
    return (names[0] if names else None), frozenset(tied) - {*names}


class _NamedModel:
    """A module tree as the translation of a config sees it."""

    def __init__(self, tree: nn.Module) -> None:
        self._modules: Modules = modules_of(tree)
        modules = self._modules
        self.type: str | None = getattr(modules.config, "model_type", None)
        self.modules: Sequence[str] = tuple(modules.by_fqn)
        self.parameters: Sequence[str] = tuple(name for name in modules.parameters if "." in name)
        self.aliases: Mapping[str, str] = {
            alias: fqn for fqn, aliases in modules.aliases.items() for alias in aliases
        }
        self.linears = modules.linears
        named = modules.by_fqn.items()
        self.embeddings = frozenset(fqn for fqn, m in named if isinstance(m, nn.Embedding))
        attentions = (fqn for fqn, m in named if isinstance(m, nn.MultiheadAttention))
        self.attentions = frozenset(attentions)
        self.embedding, self.tied = _embedding(tree, modules)
        self.stacks: Mapping[str, int] = {stack.fqn: len(stack.layers) for stack in modules.stacks}

    def select(self, selector: str) -> Selection | None:
        """Return what a selector selects; None if the language refuses it on this model."""
        (target,) = parse(f"lora 1\nadapter x {{ target? {selector} }}").adapters[0].targets
        found: list[Diagnostic] = []
        names = select(target, self._modules, found).names
        if any(diagnostic.severity == "error" for diagnostic in found):
            return None
        unmatched = any(diagnostic.code == "unmatched-target" for diagnostic in found)
        return Selection(frozenset(names), not unmatched)
