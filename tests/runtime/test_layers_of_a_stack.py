"""A new stack of layers in a model with several, against one that was built with it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lora_fx
from tests.architectures import ARCHITECTURES
from tests.by_peft import assert_same, by_peft, generate, step
from tests.dense import relative
from tests.example_inputs import example_inputs


@dataclass(frozen=True)
class Case:
    """A `layers` statement, the old index of each new layer, and the change of the config."""

    name: str
    stack: str
    ranges: str
    old: tuple[int, ...]
    config: Callable[[Any, int], None]


def setting(*names: str) -> Callable[[Any, int], None]:
    def change(config: Any, count: int) -> None:
        for name in names:
            setattr(config, name, count)

    return change


def of_text(config: Any, count: int) -> None:
    config.text_config.num_hidden_layers = count
    config.text_config.layer_types = ["full_attention"] * count


def of_vision(config: Any, count: int) -> None:
    config.vision_config.num_hidden_layers = count


CASES = {
    "more of an encoder": Case(
        "bart", "model.encoder.layers", "replicate 0..3, 1..3", (0, 1, 2, 1, 2),
        setting("encoder_layers"),
    ),
    "more of a decoder": Case(
        "bart", "model.decoder.layers", "replicate ..3, 0.. drop 1", (0, 2, 0, 2),
        setting("decoder_layers"),
    ),
    "less of a decoder": Case(
        "t5", "decoder.block", "drop 1", (0, 2), setting("num_decoder_layers")
    ),
    "more of T5's encoder": Case(
        "t5", "encoder.block", "replicate 0..3, 0..2", (0, 1, 2, 0, 1), setting("num_layers")
    ),
    "another order": Case(
        "whisper", "model.decoder.layers", "replicate 2, 0..2, 2", (2, 0, 1, 2),
        setting("decoder_layers"),
    ),
    "language": Case(
        "llava", "model.language_model.layers", "replicate 0..2, 0..3", (0, 1, 0, 1, 2), of_text
    ),
    "vision": Case("llava", "model.vision_tower.encoder.layers", "drop 0", (1, 2), of_vision),
}  # fmt: skip
ADAPTER = "adapter default { rank = 2  alpha = 3  init = random  target linear }"


def base_of(case: Case) -> PreTrainedModel:
    return ARCHITECTURES[case.name]().double().eval()


def compiled(case: Case, backend: str | None, more: str = "") -> PreTrainedModel:
    layers = f'layers {{ of = "{case.stack}"  {case.ranges}  {more} }}'
    return lora_fx.compile(base_of(case), f"lora 1 {layers} {ADAPTER}", backend=backend).double()


def built(case: Case) -> PreTrainedModel:
    """A model that had the new stack from the start, every layer's tensors copied by hand."""
    base = base_of(case)
    config = copy.deepcopy(base.config)
    case.config(config, len(case.old))
    model = type(base)(config).double().eval()
    state = base.state_dict()
    for new in range(len(case.old)):
        prefix = f"{case.stack}.{new}."
        for name, tensor in model.state_dict().items():
            if name.startswith(prefix):
                old = f"{case.stack}.{case.old[new]}.{name.removeprefix(prefix)}"
                tensor.copy_(base.state_dict()[old])
    elsewhere = {n: t for n, t in state.items() if not n.startswith(f"{case.stack}.")}
    assert not model.load_state_dict(elsewhere, strict=False).unexpected_keys
    return model


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("name", CASES)
def test_as_a_model_built_with_it(name: str, backend: str | None) -> None:
    case = CASES[name]
    model = compiled(case, backend)
    theirs = by_peft(model, built(case))
    inputs = example_inputs(model)
    wanted = step(theirs, inputs)
    assert_same(step(model, inputs), wanted, 1e-6)
    assert any(f"{case.stack}.{len(case.old) - 2}." in key for key in wanted)
    with torch.no_grad():
        before = base_of(case)(**inputs).logits
        with model.disable_adapter():
            plain = model(**inputs).logits
        assert relative(plain, built(case)(**inputs).logits) < 1e-9
        assert relative(plain, before) > 1e-4
    assert torch.equal(generate(model, inputs), generate(theirs, inputs))
    static = {"cache_implementation": "static"}
    assert torch.equal(generate(model, inputs, **static), generate(theirs, inputs))


@pytest.mark.parametrize("name", CASES)
def test_configs_are_those_of_a_model_built_with_it(name: str) -> None:
    case = CASES[name]
    model, reference = compiled(case, None), built(case)
    assert model.config.to_dict() == reference.config.to_dict()
    assert model.config.to_dict() != base_of(case).config.to_dict()
    for fqn, module in reference.named_modules():
        if hasattr(module, "config"):
            assert model.get_submodule(fqn).config.to_dict() == module.config.to_dict(), fqn


def test_copies_share_weights_unless_they_shall_not() -> None:
    case = CASES["more of a decoder"]
    one, two = (compiled(case, None, more) for more in ("", "share = nothing"))
    for model, shared in ((one, True), (two, False)):
        first, _, again, _ = model.model.decoder.layers
        weights = [layer.fc1.weight for layer in (first, again)]
        assert torch.equal(*weights)
        assert (weights[0].data_ptr() == weights[1].data_ptr()) is shared
        assert first.fc1.lora_A.default.weight is not again.fc1.lora_A.default.weight
    state = one.get_adapter_state_dict()
    with torch.no_grad():
        for key, tensor in two.get_adapter_state_dict().items():
            tensor.copy_(state[key])
    inputs = example_inputs(one)
    assert_same(step(two, inputs), step(one, inputs), 1e-12)


def test_saved_and_loaded(tmp_path: Path) -> None:
    case = CASES["more of a decoder"]
    model = compiled(case, None)
    model.save_pretrained(tmp_path)
    again = lora_fx.load(tmp_path, base=base_of(case), backend=None, is_trainable=True).double()
    inputs = example_inputs(model)
    assert_same(step(again, inputs), step(model, inputs), 1e-12)
