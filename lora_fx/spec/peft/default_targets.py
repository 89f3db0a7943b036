"""What PEFT adapts where a config names no targets, by the model's type."""

from lora_fx.diagnostics import LoraFxError
from lora_fx.spec.peft.config import PeftConfig

_Q_V = ["q_proj", "v_proj"]
_QUERY_VALUE = ["query", "value"]
_FUSED = ["query_key_value"]

# PEFT 0.21.2, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING; a text is a regex.
DEFAULT_TARGETS: dict[str, list[str] | str] = {
    "t5": ["q", "v"],
    "mt5": ["q", "v"],
    "bart": _Q_V,
    "gpt2": ["c_attn"],
    "bloom": _FUSED,
    "blip-2": ["q", "v", *_Q_V],
    "opt": _Q_V,
    "gptj": _Q_V,
    "gpt_neox": _FUSED,
    "gpt_neo": _Q_V,
    "bert": _QUERY_VALUE,
    "roberta": _QUERY_VALUE,
    "xlm-roberta": _QUERY_VALUE,
    "electra": _QUERY_VALUE,
    "deberta-v2": ["query_proj", "value_proj"],
    "deberta": ["in_proj"],
    "layoutlm": _QUERY_VALUE,
    "llama": _Q_V,
    "llama4": _Q_V,
    "chatglm": _FUSED,
    "gpt_bigcode": ["c_attn"],
    "mpt": ["Wqkv"],
    "RefinedWebModel": _FUSED,
    "RefinedWeb": _FUSED,
    "falcon": _FUSED,
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "mistral": _Q_V,
    "mixtral": _Q_V,
    "stablelm": _Q_V,
    "phi": [*_Q_V, "fc1", "fc2"],
    "gemma": _Q_V,
    "gemma2": _Q_V,
    "gemma3_text": _Q_V,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "qwen2": _Q_V,
    "qwen3": _Q_V,
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}


def default_targets(config: PeftConfig, model_type: str | None) -> list[str] | str:
    """Return the targets of a config that names none, for a model of this type.

    Raises LoraFxError for a type that PEFT has no targets for, unless parameters are targeted.
    """
    if model_type in DEFAULT_TARGETS:
        return DEFAULT_TARGETS[model_type]
    if config.get("target_parameters"):
        return []
    of_type = f"a model of type `{model_type}`" if model_type else "a model without a config"
    message = f"PEFT has no default targets for {of_type}"
    help = "name the targets in `target_modules`"
    raise LoraFxError((config.diagnostic("peft-no-targets", "target_modules", message, help=help),))


def unknown_model(config: PeftConfig) -> LoraFxError:
    """Return the error for a config whose targets depend on a model that nobody named."""
    message = "the config names no targets, and which PEFT takes depends on the model"
    help = "give the model: a folder, a `config.json` or a hub id"
    return LoraFxError(
        (config.diagnostic("peft-needs-model", "target_modules", message, help=help),)
    )
