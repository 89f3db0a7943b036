"""Inits beside the plain draws, each against PEFT's of the same name."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.init import generator_of
from lora_fx.adapters.init.orthogonal import orthogonal
from lora_fx.adapters.peft.keys import live_tensors
from tests.dense import relative
from tests.odd_models import Varied
from tests.tiny import llama, tokens

PREFIX = "base_model.model."
NAMES = ["q_proj", "up_proj", "down_proj"]


def peft(base: nn.Module, targets: list[str] = NAMES, **settings: Any) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 6} | settings)
        return get_peft_model(base, config)


def compiled(text: str, base: nn.Module, **settings: Any) -> Any:
    return lora_fx.compile(base, f"lora 1 adapter default {{ {text} }}", backend=None, **settings)


def theirs(model: PeftModel) -> Mapping[str, Tensor]:
    state = model.named_parameters()
    return {n.removeprefix(PREFIX).replace(".default", ""): p for n, p in state if "lora_" in n}


def sites(tensors: Mapping[str, Tensor]) -> list[str]:
    ends = (".lora_A.weight", ".lora_embedding_A")
    return [n.removesuffix(e) for e in ends for n in tensors if n.endswith(e)]


def test_orthogonal_is_what_peft_draws() -> None:
    want = peft(llama(1), ["up_proj"], init_lora_weights="orthogonal")
    torch.manual_seed(5)
    want.get_submodule("base_model.model.model.layers.0.mlp.up_proj").orthogonal_init("default")
    A, B = orthogonal(32, 44, 4, torch.Generator().manual_seed(5))
    for name, factor in (("A", A), ("B", B)):
        named = theirs(want)[f"model.layers.0.mlp.up_proj.lora_{name}.weight"]
        assert relative(factor, named) < 1e-6
        assert relative(named.flip(0), factor) > 1


def test_orthogonal_starts_as_the_base() -> None:
    A, B = orthogonal(307, 211, 18, generator_of(0, "x", "y"))
    assert A.shape == (18, 307)
    assert B.shape == (211, 18)
    assert (B.double() @ A.double()).abs().max() < 1e-6
    assert (B.double() @ A.double().flip(0)).abs().max() > 0.1
    base = llama(2)
    model = compiled("rank = 4 init = orthogonal target linear", base)
    assert relative(model(tokens()).logits, base(tokens()).logits) < 1e-5
    assert all(p.norm() > 0 for n, p in model.named_parameters() if "lora_" in n)


def test_orthogonal_needs_an_even_rank() -> None:
    with pytest.raises(lora_fx.LoraFxError, match="even rank"):
        compiled("rank = 3 init = orthogonal target linear", llama(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("base", "targets"), [(llama, NAMES), (Varied, ["mix", "up", "embed"])])
def test_mica_is_that_of_peft(base: Any, targets: list[str], dtype: torch.dtype) -> None:
    """Singular vectors are known up to their signs, and B Bᵀ does not see them."""
    model = compiled(f"rank = 2 init = mica target {', '.join(targets)}", base().to(dtype))
    want = theirs(peft(base().to(dtype), targets, r=2, init_lora_weights="mica"))
    ours = live_tensors(model, "default")
    assert sites(ours)
    assert sorted(sites(ours)) == sorted(sites(want))
    for site in sites(ours):
        A, B = (n for n in ours if n.startswith(f"{site}.lora_"))
        assert not ours[A].any()
        assert ours[A].requires_grad
        assert not ours[B].requires_grad
        own, named = ours[B].double(), want[B].double()
        tolerance = 3e-5 if dtype is torch.float32 else 2e-2
        assert relative(own @ own.T, named @ named.T) < tolerance
        assert relative(own.roll(1, 0) @ own.roll(1, 0).T, named @ named.T) > 0.3


def test_mica_trains_a_alone_and_goes_to_peft_and_back(tmp_path: Path) -> None:
    model = compiled("rank = 3 alpha = 5 init = mica target linear", llama(2))
    for name, tensor in live_tensors(model, "default").items():
        if "lora_A" in name:
            nn.init.normal_(tensor, std=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    grads = {n for n, p in live_tensors(model, "default").items() if p.grad is not None}
    assert grads == {n for n in live_tensors(model, "default") if "lora_A" in n}
    model.save_pretrained(tmp_path)
    again = lora_fx.load(tmp_path, llama(2), backend=None, is_trainable=True)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    flags = {n: p.requires_grad for n, p in live_tensors(again, "default").items()}
    assert flags == {n: "lora_A" in n for n in flags}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = PeftModel.from_pretrained(llama(2), tmp_path, is_trainable=True).eval()
    assert relative(other(tokens()).logits, model(tokens()).logits) < 1e-5
    assert {n for n, p in theirs(other).items() if p.requires_grad} == grads


def test_mica_does_not_go_with_a_bias_on_b() -> None:
    with pytest.raises(lora_fx.LoraFxError, match="do not go together"):
        compiled("rank = 3 init = mica lora_bias = true target linear", llama(1))
