"""Magnitudes at sites whose base weight the adapter's init changed."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.sites.magnitudes import effective_delta
from lora_fx.adapters.weights.changed_weight import original
from lora_fx.diagnostics import LoraFxError
from tests.adapters.kinds import scatter
from tests.dense import relative
from tests.tiny import llama, tokens

SPEC = """lora 1
adapter a {{ rank = 4  alpha = 6  variant = dora  init = {init}  target q_proj, up_proj }}"""


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_it_starts_as_the_base_and_is_what_its_weights_say(init: str) -> None:
    base = llama(2).double()
    model = lora_fx.compile(base, SPEC.format(init=init), backend=None)
    assert relative(logits(model), logits(base)) < 1e-6
    scatter(model, "a")
    assert relative(logits(model), logits(base)) > 1e-2
    for fqn, site in storage.sites(model):
        weight = base.get_submodule(fqn).get_parameter("weight")
        assert relative(original(site), weight) < 1e-6
        weight.data = site.weight + effective_delta(site, "a")
    assert relative(logits(model), logits(base)) < 1e-6
    with model.disable_adapter():
        assert relative(logits(model), logits(llama(2).double())) < 1e-6


def test_it_is_what_peft_computes() -> None:
    model = lora_fx.compile(llama(2), SPEC.format(init="olora"), backend=None)
    config = LoraConfig(
        r=4, lora_alpha=6, use_dora=True, init_lora_weights="olora",
        target_modules=["q_proj", "up_proj"],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        theirs = get_peft_model(llama(2), config)
    own = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if "lora_" in name:
            name = name.replace(".default", ".a")
            name = name if name in own else f"{name}.weight"
            assert relative(own[name], parameter) < 1e-4, name
            parameter.data.mul_(1.5)
            own[name].data.copy_(parameter)
    assert relative(logits(model), logits(theirs)) < 1e-5


def test_a_folder_brings_it_back(tmp_path: Path) -> None:
    model = lora_fx.compile(llama(2), SPEC.format(init="pissa"), backend=None)
    scatter(model, "a")
    model.save_pretrained(tmp_path)
    again = lora_fx.load(tmp_path, base=llama(2), backend=None)
    assert relative(logits(again), logits(model)) < 1e-5


def test_norms_of_a_weight_that_another_adapter_changes_are_refused() -> None:
    text = """lora 1
    adapter a { init = pissa  target q_proj }
    adapter b { variant = dora  target q_proj in layers[1..] }"""
    with pytest.raises(LoraFxError, match="which `a` changes") as error:
        lora_fx.compile(llama(2), text, backend=None)
    assert len(error.value.diagnostics) == 1
    other = text.replace("adapter a", "adapter c").replace("adapter b", "adapter a")
    turned = "\n".join((other.splitlines()[0], *reversed(other.splitlines()[1:])))
    with pytest.raises(LoraFxError, match="has norms of the weight"):
        lora_fx.compile(llama(2), turned, backend=None)
