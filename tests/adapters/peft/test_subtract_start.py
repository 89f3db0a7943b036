"""PEFT's folders over a changed base, made plain LoRA over the original one."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import lora_fx
from tests.dense import relative
from tests.runtime.test_combine import loaded_by_peft
from tests.runtime.test_merge import logits
from tests.tiny import llama

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 9}, "use_rslora": True},
    "dora": {"use_dora": True},
    "copies": {"modules_to_save": ["norm"], "bias": "lora_only"},
    "rows": {"trainable_token_indices": [3, 7]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "olora"},
    "random": {"init_lora_weights": False},
}


def written(feature: str, folder: Path) -> Any:
    """A model of PEFT's after training, with its folders before and after."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}
    settings |= {"init_lora_weights": "pissa_niter_2", **FEATURES[feature]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(llama(2, attention_bias=True), LoraConfig(**settings)).eval()
        model.save_pretrained(folder / "initial")
        generator = torch.Generator().manual_seed(4)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / "trained")
    return model


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "random"])
def test_it_computes_what_was_trained(feature: str, tmp_path: Path) -> None:
    want = logits(written(feature, tmp_path))
    lora_fx.subtract_mutated_init(tmp_path / "trained", tmp_path / "initial", tmp_path / "plain")
    base = llama(2, attention_bias=True)
    loaded: Any = lora_fx.load(tmp_path / "plain", base, backend=None).eval()
    assert relative(logits(loaded), want) < 1e-5
    assert relative(logits(base.eval()), want) > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = loaded_by_peft(tmp_path / "plain", llama(2, attention_bias=True))
    assert relative(logits(theirs), want) < 1e-5


def test_the_tensors_are_those_of_peft_s_own_conversion(tmp_path: Path) -> None:
    model = written("plain", tmp_path)
    lora_fx.subtract_mutated_init(tmp_path / "trained", tmp_path / "initial", tmp_path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(
            tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "initial"
        )
    ours = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_folders_of_two_adapters_are_refused(tmp_path: Path) -> None:
    written("plain", tmp_path / "one")
    written("embedding", tmp_path / "two")
    with pytest.raises(lora_fx.LoraFxError, match=r"has no `.*v_proj"):
        lora_fx.subtract_mutated_init(
            tmp_path / "one" / "trained", tmp_path / "two" / "initial", tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


REFUSED = {
    "target_parameters": 'target parameter "**.q_proj.weight"',
    "kasa_config": "variant = kasa target q_proj",
    "monteclora_config": "variant = monteclora target q_proj",
    "use_bdlora": 'rank = 4 variant = bdlora(a = ["q_proj"], blocks = 2) target q_proj',
    "init_lora_weights": "init = loftq target q_proj",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_such_start_is_refused(name: str, tmp_path: Path) -> None:
    """Of experts, and of blocks, the rows would be others'."""
    text = f"lora 1 adapter default {{ {REFUSED[name]} }}"
    model: Any = lora_fx.compile(llama(2), text, backend=None)
    model.save_pretrained(tmp_path / "one")
    with pytest.raises(lora_fx.LoraFxError, match=name):
        lora_fx.subtract_mutated_init(tmp_path / "one", tmp_path / "one", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_random_start_is_no_part_of_the_base(tmp_path: Path) -> None:
    written("random", tmp_path)
    with pytest.raises(lora_fx.LoraFxError, match="is `false`"):
        lora_fx.subtract_mutated_init(tmp_path / "trained", tmp_path / "initial", tmp_path / "out")
