"""The programs that an `entry` of a spec stands for, run on examples of its sizes.

`train` is a training step, `forward` an evaluation, `generate` text from prompts. What Trainer and
TRL do otherwise makes graphs of its own, so each is run: a cache that is not asked for and one that
is refused, samples that are padded and samples that are not.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.activations.example import NoExample, example_of
from lora_fx.spec.spec import EntrySpec

Inputs = dict[str, Any]
_LIKE_TOKENS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")
_NEW_TOKENS = 4


def programs(model: nn.Module, entry: EntrySpec) -> list[Callable[[], Any]]:
    """Return what an entry runs, step by step. Raises LoraFxError if the model cannot do it."""
    inputs = _example(model, entry)
    if entry.name == "generate":
        return [lambda i=i: _generate(model, i) for i in _prompts(model, inputs, entry)]
    run = _train if entry.name == "train" else _evaluate
    return [lambda i=i: run(model, i) for i in _calls(model, inputs)]


def _example(model: nn.Module, entry: EntrySpec) -> Inputs:
    if not isinstance(model, PreTrainedModel):
        raise _cannot(entry, f"a `{type(model).__name__}` does not say what its inputs are")
    if entry.name == "generate" and not model.can_generate():
        raise _cannot(entry, f"a `{type(model).__name__}` does not generate")
    try:
        inputs = example_of(model, entry.batch, entry.sequence).inputs
    except NoExample as error:
        raise _cannot(entry, str(error)) from error
    inputs.pop("use_cache", None)
    return {name: _filled(model, value) for name, value in inputs.items()}


def _filled(model: PreTrainedModel, value: Tensor) -> Tensor:
    """Return a real tensor like a meta one; tokens are none of those with a meaning."""
    if value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype, device=model.device)
    special = set(_special_tokens(model.config.to_dict()))
    token = next(token for token in range(len(special) + 1) if token not in special)
    return torch.full(value.shape, token, dtype=value.dtype, device=model.device)


def _special_tokens(config: dict[str, Any]) -> Iterator[int]:
    """Yield every token that a config, or one inside it, gives a meaning."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif str(name).endswith(("_token_id", "_token_index")):
            yield from value if isinstance(value, list) else [value] if value is not None else []


def _calls(model: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
    """Yield the ways in which a model is called with these inputs and its labels."""
    takes = inspect.signature(model.forward).parameters
    labels = _labels(model, inputs) if "labels" in takes else {}
    caches: list[Inputs] = [{}, {"use_cache": False}] if "use_cache" in takes else [{}]
    for cache in caches:
        for mask in _masks(inputs, takes, on_the_left=False):
            yield inputs | mask | labels | cache


def _prompts(model: nn.Module, inputs: Inputs, entry: EntrySpec) -> Iterator[Inputs]:
    """Yield prompts of two lengths, so that lengths become symbols, each whole and padded."""
    takes = inspect.signature(model.forward).parameters
    lengths = [entry.sequence, max(2, entry.sequence // 2)] if "input_ids" in inputs else [None]
    for length in lengths:
        of_length = {n: v[:, :length] if n == "input_ids" else v for n, v in inputs.items()}
        of_length.pop("decoder_input_ids", None)
        for mask in _masks(of_length, takes, on_the_left=True):
            yield of_length | mask


def _masks(inputs: Inputs, takes: Any, on_the_left: bool) -> list[Inputs]:
    """Return a mask of ones, and one that hides a token at an end of a sample."""
    if "attention_mask" not in takes or "input_ids" not in inputs:
        return [{}]
    whole = torch.ones_like(inputs["input_ids"])
    padded = whole.clone()
    padded[0, 0 if on_the_left else -1] = 0
    return [{"attention_mask": whole}, {"attention_mask": padded}]


def _labels(model: nn.Module, inputs: Inputs) -> Inputs:
    name = type(model).__name__
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if tokens is not None and name.endswith(_LIKE_TOKENS):
        return {"labels": tokens}
    if tokens is not None and name.endswith("ForTokenClassification"):
        return {"labels": torch.zeros_like(tokens)}
    if name.endswith(("ForSequenceClassification", "ForImageClassification")):
        first = next(iter(inputs.values()))
        return {"labels": torch.zeros(len(first), dtype=torch.long, device=first.device)}
    return {}


def _train(model: Any, inputs: Inputs) -> None:
    model.train()
    with torch.enable_grad():
        result = model(**inputs)
        loss = getattr(result, "loss", None)
        (result[0].float().sum() if loss is None else loss).backward()
    model.zero_grad()


def _evaluate(model: Any, inputs: Inputs) -> None:
    model.eval()
    with torch.no_grad():
        model(**inputs)


def _generate(model: Any, inputs: Inputs) -> None:
    model.eval()
    model.generate(
        **inputs,
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
    )


def _cannot(entry: EntrySpec, reason: str) -> LoraFxError:
    message = f"`entry {entry.name}` cannot be compiled ahead for this model"
    help = "leave the entry out: what it stands for is compiled when it first runs"
    return LoraFxError((Diagnostic("entry-impossible", message, entry.span, reason, help=help),))
