"""PEFT configs of every kind, made of a model's own names."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_fx.plan.stacks import find_stacks
from lora_fx.spec.peft.default_targets import DEFAULT_TARGETS

Config = Mapping[str, Any]
Named = Iterator[tuple[str, Config]]

# PEFT refuses to adapt `out_proj` and `conv1d` of state space layers, and heads that it trains.
# Where transformers stacks experts, their old names have configs of their own.
_LEFT_OUT = ("out_proj", "conv1d", "classifier", "pre_classifier", "qa_outputs", "score")
_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_REPLICATED = ("LlamaForCausalLM", "Qwen3ForCausalLM", "BertForSequenceClassification")


def configs(model: PreTrainedModel) -> Named:
    """Yield every config that PEFT accepts on the model, with a name."""
    left_out = (*_LEFT_OUT, *(_EXPERTS if _stacked(model) else ()))
    names = [name for name in _linears(model) if name.rpartition(".")[2] not in left_out]
    leaves = Counter(name.rpartition(".")[2] for name in names).most_common()
    a, b = leaves[0][0], leaves[-1][0]
    first = next(name for name in names if name.endswith(f".{a}"))
    yield from _targets(model, a, b, first)
    yield from _in_layers(model, a, b, first)
    yield from _patterns(a, b, first)
    yield from _arithmetic(a, b)
    yield from _trained(model, a, b, first)
    yield from _parameters(model, a)


def _targets(model: PreTrainedModel, a: str, b: str, first: str) -> Named:
    two = {"target_modules": [a, b], "r": 2}
    wide = {"target_modules": "all-linear", "r": 2, "exclude_modules": ["out_proj"]}
    if model.config.model_type in DEFAULT_TARGETS and model.config.model_type != "mixtral":
        yield "default", {"r": 3, "lora_alpha": 12}
    yield "suffixes", {**two, "target_modules": [a, b, "not_there"], "lora_alpha": 2.5}
    yield "dotted", {**two, "target_modules": [".".join(first.split(".")[-2:]), first]}
    yield "regex", {**two, "target_modules": rf".*\.(?:{a}|{b})"}
    yield "all-linear", wide
    yield "excluded", {**two, "exclude_modules": [first, "not_there"]}
    yield "excluded-regex", {**wide, "exclude_modules": rf".*out_proj|.*\.0\..*{a}"}
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
    if convolutions and not convolutions[0].endswith("conv1d"):
        yield "convolution", {**two, "target_modules": [a, convolutions[0]]}


def _in_layers(model: PreTrainedModel, a: str, b: str, first: str) -> Named:
    two = {"target_modules": [a, b], "r": 2}
    pattern = find_stacks(model)[0].fqn.rpartition(".")[2]
    yield "layers", {**two, "layers_to_transform": [0, 2, 9]}
    yield "one-layer", {**two, "layers_to_transform": 1, "target_modules": [a, first]}
    yield "layers-pattern", {**two, "layers_to_transform": [1], "layers_pattern": ["nope", pattern]}
    yield (
        "patterns-in-layers",
        {**two, "layers_to_transform": [0], "rank_pattern": {first: 4, a: 3}},
    )
    if type(model).__name__ in _REPLICATED:
        ranks = {r".*\.4\..*": 3}
        yield "replicated", {**two, "layer_replication": [(0, 2), (0, 3)], "rank_pattern": ranks}


def _patterns(a: str, b: str, first: str) -> Named:
    inside = ".".join(first.split(".")[-2:])
    ranks = {first: 4, inside: 3, rf".*\.1\..*{b}": 5, a: 6, ".*": 1}
    alphas = {a: 7, first: 2.5, "not_there": 3, rf".*{b[-3:]}": 9}
    two = {"target_modules": [a, b], "r": 2, "rank_pattern": ranks, "alpha_pattern": alphas}
    yield "patterns", two
    yield (
        "patterns-on-all",
        {
            **two,
            "target_modules": "all-linear",
            "exclude_modules": ["out_proj"],
            "alpha_pattern": {first: 5, a: 3},
        },
    )
    yield "patterns-on-a-regex", {**two, "target_modules": rf".*{a}", "exclude_modules": [first]}


def _arithmetic(a: str, b: str) -> Named:
    two = {"target_modules": [a, b], "r": 2}
    yield "rslora", {**two, "use_rslora": True, "rank_pattern": {a: 3}}
    yield "dora", {**two, "use_dora": True}
    yield "bias", {**two, "bias": "all"}
    yield "bias-of-targets", {**two, "bias": "lora_only"}
    yield "lora-bias", {**two, "lora_bias": True}


def _trained(model: PreTrainedModel, a: str, b: str, first: str) -> Named:
    two = {"target_modules": [a, b], "r": 2}
    norms = [n for n, module in model.named_modules() if "Norm" in type(module).__name__]
    saved = [norms[-1].rpartition(".")[2], "not_there"]
    yield "saved", {**two, "modules_to_save": saved}
    yield "saved-whole", {**two, "modules_to_save": [first.rpartition(".")[0]]}
    yield "head", {**two, "modules_to_save": saved[:1], "task_type": _task(model)}
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        return
    name = next(name for name, module in model.named_modules() if module is embedding)
    yield "embedding", {**two, "target_modules": [a, name.rpartition(".")[2]]}
    yield "saved-embedding", {**two, "modules_to_save": [name.rpartition(".")[2]]}
    yield "tokens", {**two, "trainable_token_indices": [3, 1, 7]}
    yield "tokens-by-name", {**two, "trainable_token_indices": {name: [2, 5]}}
    # In encoder-decoders PEFT gives each of the tied embeddings tensors of its own.
    head = getattr(model, "lm_head", None)
    if head is not None and head.weight is embedding.weight and not model.config.is_encoder_decoder:
        rows = {name: [2, 5], "lm_head": [2, 5]}
        yield "tied", {**two, "target_modules": [a, "lm_head"], "ensure_weight_tying": True}
        yield "tied-regex", {**two, "target_modules": "(.*)?lm_head", "ensure_weight_tying": True}
        yield "tied-saved", {**two, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}
        yield "tied-tokens", {**two, "trainable_token_indices": rows, "ensure_weight_tying": True}


def _parameters(model: PreTrainedModel, a: str) -> Named:
    stacked = _stacked(model)
    if not stacked:
        return
    name = stacked[-1]
    leaf = name.rpartition(".")[2]
    wanted = {"target_modules": [a], "r": 2, "target_parameters": [leaf, "not.there"]}
    yield "parameters", wanted
    yield "one-parameter", {**wanted, "target_modules": [], "target_parameters": [name]}
    ranks = {name: 4, rf".*\.experts\.{leaf}": 3, a: 1}
    yield "parameter-patterns", {**wanted, "rank_pattern": ranks, "alpha_pattern": {leaf: 5}}
    old = {"mixtral": ["w1", "w2", "w3"], "gpt_oss": []}.get(model.config.model_type)
    experts = _EXPERTS if old is None else old
    if experts:
        yield "old-names", {"target_modules": ["q_proj", *experts], "r": 2, "lora_alpha": 3}
        yield "old-regex", {"target_modules": rf".*\.(o_proj|{'|'.join(experts)})", "r": 2}


def _task(model: PreTrainedModel) -> str | None:
    tasks = {"Sequence": "SEQ_CLS", "Token": "TOKEN_CLS", "Question": "QUESTION_ANS"}
    return next((task for word, task in tasks.items() if word in type(model).__name__), None)


def _stacked(model: PreTrainedModel) -> list[str]:
    return [name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name]


def _linears(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
