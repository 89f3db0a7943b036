"""Tiny random models of many architectures, three layers in each stack.

`ARCHITECTURES[name]()` builds a model on the current device: under `torch.device("meta")` without
weights, else with random ones that are the same at every call. It takes another count of layers.
`CONVOLUTIONAL` are models that mostly convolve.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

LAYERS = 3
VOCABULARY = 101
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
_GROUPED = {**_TOKENS, **_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {**_TOKENS, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
_ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 44,
}


_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_COUNTS += ("encoder_layers", "decoder_layers")


def _deep(sizes: dict[str, Any], layers: int) -> dict[str, Any]:
    return {name: layers if name in _COUNTS else value for name, value in sizes.items()}


def _of(model: str, config: str, sizes: dict[str, Any], **more: Any) -> Callable[..., Any]:
    def build(layers: int = LAYERS) -> PreTrainedModel:
        torch.manual_seed(0)
        return getattr(hf, model)(getattr(hf, config)(**_deep({**sizes, **more}, layers)))

    return build


def _vision_language(layers: int = LAYERS) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {k: v for k, v in _GROUPED.items() if k != "head_dim"}
    text = hf.Qwen2Config(**_deep(sizes, layers))
    vision = hf.CLIPVisionConfig(**_deep({**_SIZES, **_IMAGE}, layers))
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)
    )


ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _of("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": _of("MistralForCausalLM", "MistralConfig", _GROUPED, tie_word_embeddings=True),
    "qwen2": _of("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": _of("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "gemma3_text": _of("Gemma3ForCausalLM", "Gemma3TextConfig", _GROUPED),
    "phi": _of("PhiForCausalLM", "PhiConfig", _GROUPED),
    "phi3": _of("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "stablelm": _of("StableLmForCausalLM", "StableLmConfig", _GROUPED),
    "gpt2": _of("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gptj": _of("GPTJForCausalLM", "GPTJConfig", _GPT, rotary_dim=4),
    "gpt_neox": _of("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_TOKENS, **_SIZES}),
    "bloom": _of(
        "BloomForCausalLM", "BloomConfig", {**_TOKENS, **_SIZES}, n_layer=LAYERS, n_head=4
    ),
    "falcon": _of("FalconForCausalLM", "FalconConfig", {**_TOKENS, **_SIZES}),
    "opt": _of(
        "OPTForCausalLM", "OPTConfig", {**_TOKENS, **_SIZES}, ffn_dim=44, word_embed_proj_dim=32
    ),
    "mixtral": _of("MixtralForCausalLM", "MixtralConfig", _GROUPED, num_local_experts=4),
    "qwen3_moe": _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _EXPERTS, mlp_only_layers=[0]),
    "olmoe": _of("OlmoeForCausalLM", "OlmoeConfig", _GROUPED, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": _of(
        "GptOssForCausalLM", "GptOssConfig", _GROUPED, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": _of(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_TOKENS, **_SIZES},
        num_key_value_heads=4,
        moe_intermediate_size=20,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=8,
    ),
    "mamba2": _of(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**_TOKENS, "hidden_size": 32, "num_hidden_layers": LAYERS},
        num_heads=8,
        head_dim=8,
        state_size=6,
        n_groups=2,
        chunk_size=4,
    ),
    "falcon_h1": _of(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        _GROUPED,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=6,
        mamba_n_groups=2,
        mamba_chunk_size=4,
    ),
    "bert": _of("BertForSequenceClassification", "BertConfig", {**_TOKENS, **_SIZES}),
    "roberta": _of("RobertaForQuestionAnswering", "RobertaConfig", {**_TOKENS, **_SIZES}),
    "distilbert": _of(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _TOKENS,
        dim=32,
        hidden_dim=44,
        n_layers=LAYERS,
        n_heads=4,
    ),
    "deberta_v2": _of("DebertaV2ForTokenClassification", "DebertaV2Config", {**_TOKENS, **_SIZES}),
    "t5": _of(
        "T5ForConditionalGeneration",
        "T5Config",
        _TOKENS,
        d_model=32,
        d_kv=8,
        d_ff=44,
        num_layers=LAYERS,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "bart": _of(
        "BartForConditionalGeneration",
        "BartConfig",
        {**_TOKENS, **_ENCODER_DECODER},
        decoder_start_token_id=2,
    ),
    "whisper": _of(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_TOKENS, **_ENCODER_DECODER},
        num_mel_bins=12,
        max_source_positions=20,
        max_target_positions=24,
        decoder_start_token_id=1,
    ),
    "vit": _of("ViTForImageClassification", "ViTConfig", {**_SIZES, **_IMAGE}, num_labels=5),
    "llava": _vision_language,
}

CONVOLUTIONAL: dict[str, Callable[..., PreTrainedModel]] = {
    "resnet": _of(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 6, "hidden_sizes": [12, 20], "depths": [2, 2], "num_labels": 5},
    ),
    "convnext": _of(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [6, 9], "depths": [2, 2], "num_stages": 2, "num_labels": 5},
        patch_size=2,
        layer_scale_init_value=0.5,
    ),
    "wav2vec2": _of(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {**_TOKENS, **_SIZES, "conv_dim": (6, 7), "conv_stride": (3, 2), "conv_kernel": (5, 3)},
        conv_bias=True,
        feat_extract_norm="layer",
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=10,
    ),
}


def on_meta(name: str) -> PreTrainedModel:
    """Build one of the models without weights."""
    with torch.device("meta"):
        return ARCHITECTURES[name]()
