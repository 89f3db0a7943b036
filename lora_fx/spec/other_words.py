"""What PEFT, transformers, bitsandbytes and Python call what this language says otherwise."""

import re

# A setting or statement: the same in this language.
_SETTINGS = {
    "r": "rank = 16",
    "lora_r": "rank = 16",
    "lora_rank": "rank = 16",
    "lora_alpha": "alpha = 32",
    "lora_dropout": "dropout = 5%",
    "rank_pattern": "target o_proj { rank = 32 }",
    "alpha_pattern": "target o_proj { alpha = 64 }",
    "use_rslora": "scaling = rslora",
    "use_dora": "variant = dora",
    "alora_invocation_tokens": "variant = alora(tokens = [128, 4711])",
    "velora_config": "variant = velora(num_groups = 64)",
    "kasa_config": "variant = kasa(beta = 1e-4)",
    "use_bdlora": 'variant = bdlora(a = ["o_proj"], b = ["q_proj"], blocks = 2)',
    "monteclora_config": "variant = monteclora(num_samples = 8)",
    "arrow_config": "route { by = arrow(top = 3) }",
    "router_temperature": "route { by = arrow(temperature = 1.0) }",
    "use_gks": 'route { by = arrow(general = ["other"]) }',
    "init_lora_weights": "init = gaussian",
    "loftq_config": "init = loftq(bits = 4)",
    "eva_config": "init = eva(rho = 2.0)",
    "corda_config": "init = corda(method = kpm)",
    "lora_ga_config": "init = lora_ga(scale = unit)",
    "ensure_weight_tying": "tie = true",
    "runtime_config": "offload = true",
    "ephemeral_gpu_offload": "offload = true",
    "autocast_adapter_dtype": "dtype = float32",
    "inference_mode": "trainable = false",
    "is_trainable": "trainable = true",
    "target_modules": "target q_proj, v_proj",
    "target_parameters": 'target parameter "**.experts.down_proj"',
    "exclude_modules": "target linear except down_proj",
    "layers_to_transform": "target linear in layers[0..8]",
    "layers_pattern": 'target linear in layers of "model.layers"[0..8]',
    "modules_to_save": "train lm_head",
    "task_type": "train? score, classifier",
    "trainable_token_indices": "tokens [0, 1]",
    "layer_replication": "layers { replicate 0..20, 10..30 }",
    "base_model_name_or_path": 'model "org/name"',
    "torch_dtype": 'model "org/name" { dtype = bfloat16 }',
    "load_in_4bit": "quantize linear { method = nf4 }",
    "load_in_8bit": "quantize linear { method = int8 }",
    "bnb_4bit_quant_type": "quantize linear { method = nf4 }",
    "bnb_4bit_use_double_quant": "quantize linear { method = nf4(double_quant = true) }",
    "bnb_4bit_compute_dtype": "quantize linear { method = nf4(compute_dtype = bfloat16) }",
    "learning_rate": "optimizer { lr = 2e-4 }",
    "optimizer_cls": "optimizer { name = adamw  lr = 2e-4 }",
    "loraplus_lr_ratio": "optimizer { lr = 2e-4  loraplus_ratio = 16 }",
    "loraplus_weight_decay": "optimizer { lr = 2e-4  weight_decay = 0.01 }",
    "loraplus_lr_embedding": "optimizer { lr = 2e-4  embedding_lr = 1e-6 }",
    "adapters": "from 0.7 * one + 0.3 * other",
    "combination_type": "method = cat",
    "svd_rank": "rank = svd(32)",
    "majority_sign_method": "method = ties(density = 0.5, sign = total)",
    "gradient_checkpointing": "compile { checkpoint = layers }",
}
_NEEDLESS = ("fan_in_fan_out", "peft_type", "peft_version", "auto_mapping")
# A value: the same in this language.
_VALUES = (
    (r"true", "true"),
    (r"false", "false"),
    (r"torch\.(float32|bfloat16|float16)", r"\1"),
    (r"fp32|(torch\.)?float", "float32"),
    (r"fp16|(torch\.)?half", "float16"),
    (r"bf16", "bfloat16"),
    (r"pissa_niter_([0-9]{1,9})", r"pissa(iterations = \1)"),
    (r"adamw_torch(_fused)?", "adamw"),
    (r"adamw_8bit|adamw_bnb_8bit", "adamw8bit"),
    (r"paged_adamw_8bit", "paged_adamw8bit"),
)


def other_setting(name: str) -> str | None:
    """Return how the language says a setting of another tool, as help."""
    if name in _NEEDLESS:
        return "leave it out: nothing has to be said of it here"
    return f"write it as in `{_SETTINGS[name]}`" if name in _SETTINGS else None


def is_selector(name: str) -> bool:
    """Whether a setting of another tool is a statement here that names modules."""
    first = _SETTINGS.get(name, "").partition(" ")[0]
    return first in ("target", "train", "train?", "tokens")


def other_value(text: str) -> str | None:
    """Return how the language writes a value of another tool, or None."""
    for pattern, ours in _VALUES:
        found = re.fullmatch(pattern, text, re.IGNORECASE)
        if found:
            return found.expand(ours)
    return None
