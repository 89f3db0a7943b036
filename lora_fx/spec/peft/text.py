"""A PEFT config as the text of a `.lora` file."""

from collections.abc import Iterator
from dataclasses import replace

from lora_fx.diagnostics import LoraFxError, Source
from lora_fx.spec.expressions import quote
from lora_fx.spec.formatter import format_source
from lora_fx.spec.peft.attributes import attributes
from lora_fx.spec.peft.config import PeftConfig
from lora_fx.spec.peft.default_targets import default_targets, unknown_model
from lora_fx.spec.peft.known import Known
from lora_fx.spec.peft.model import Model
from lora_fx.spec.peft.moe import with_stacked_experts
from lora_fx.spec.peft.pattern_rules import pattern_rules, pattern_rules_on
from lora_fx.spec.peft.rule import Rule
from lora_fx.spec.peft.targets import target_rules, target_rules_on
from lora_fx.spec.peft.trained import token_statements, train_statements, train_statements_on
from lora_fx.spec.peft.tying import with_tied_embedding


def to_text(config: PeftConfig, model: Model | None = None) -> str:
    """Return a `.lora` text that says what the config says.

    On a model that is given it plans to just the sites, ranks and scales that PEFT makes. Without
    one it holds for every model, as far as names of modules say what PEFT's patterns mean. Raises
    LoraFxError for what the language cannot say.
    """
    config = _with_targets(config, model)
    known = None if model is None else Known(config, model)
    if known is not None:
        _refuse(known)
    targets = target_rules_on(known) if known else target_rules(config)
    patterns = pattern_rules_on(known, targets) if known else pattern_rules(config, targets)
    trained = train_statements_on(known) if known else train_statements(config)
    parts = (
        [f"{name} = {value}" for name, value in attributes(config).items()],
        [rule.text() for rule in (*targets, *patterns, *_without_dropout(known))],
        [*trained, *token_statements(config, known)],
    )
    body = "\n\n".join("\n".join(part) for part in parts if part)
    text = f"{head(config)}\nadapter default {{\n{body}\n}}\n"
    return format_source(Source("<text>", text))


def head(config: PeftConfig) -> str:
    """Return the statements about the model: which one, and its layers."""
    return "\n".join(["lora 1\n", *_model(config), *_layers(config)])


def _with_targets(config: PeftConfig, model: Model | None) -> PeftConfig:
    if model is not None:
        config = with_tied_embedding(with_stacked_experts(config, model), model)
    if config.names_targets:
        return config
    if model is None:
        raise unknown_model(config)
    wanted = default_targets(config, model.type)
    return replace(config, values={**config.values, "target_modules": wanted})


def _without_dropout(known: Known | None) -> Iterator[Rule]:
    """Yield the statement for embeddings and attentions, at which PEFT leaves dropout out."""
    if known is not None and known.config.get("lora_dropout"):
        without = known.model.embeddings | known.model.attentions
        for rule in known.first_exact((), known.sites & without):
            yield replace(rule, settings={"dropout": "0"})


def _refuse(known: Known) -> None:
    """Refuse what PEFT refuses on a model too, and what only PEFT can do there."""
    names = known.sites | known.parameters
    if not names:
        message = "PEFT finds nothing to adapt in this model"
        raise LoraFxError((known.config.diagnostic("peft-no-targets", "target_modules", message),))
    adapted = sorted(filter(known.is_trained, names))
    if adapted:
        message = f"`{adapted[0]}` is adapted inside a module that is trained as a whole"
        help = "write the module's name in full, or take it out of `target_modules`"
        raise LoraFxError(
            (known.config.diagnostic("peft-unsupported", "modules_to_save", message, help=help),)
        )


def _model(config: PeftConfig) -> Iterator[str]:
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if name:
        block = f" {{ revision = {quote(revision)} }}" if revision else ""
        yield f"model {quote(name)}{block}\n"


def _layers(config: PeftConfig) -> Iterator[str]:
    pairs = config.get("layer_replication")
    if pairs:
        yield f"layers {{ replicate {', '.join(f'{a}..{b}' for a, b in pairs)} }}\n"
