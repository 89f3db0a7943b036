"""The same adapters in PEFT and here, on one tiny base."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters import storage
from tests.dense import relative
from tests.tiny import llama, tokens

PREFIX = "base_model.model."
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_model(base: nn.Module | None = None, name: str = "default", **settings: Any) -> PeftModel:
    """A PEFT model whose A and B are both random."""
    torch.manual_seed(1)
    defaults = {"r": 3, "lora_alpha": 5, "target_modules": PROJECTIONS, "init_lora_weights": False}
    with _only_old_names():
        config = LoraConfig(task_type="CAUSAL_LM", **defaults | settings)
        return get_peft_model(base or llama(4), config, name)


def from_folder(folder: Path, base: nn.Module | None = None, name: str = "default") -> PeftModel:
    """What PEFT reads from a folder; any warning of its is an error."""
    with _only_old_names():
        return PeftModel.from_pretrained(base or llama(4), folder, name).eval()


@contextmanager
def _only_old_names() -> Iterator[None]:
    """Every warning is an error, but for PEFT's use of transformers' old names."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def assert_same_logits(got: nn.Module, want: nn.Module) -> None:
    """Equal to 1e-5, and both far from the base model."""
    result, expected = logits(got.eval()), logits(want.eval())
    with want.disable_adapter():
        assert relative(logits(want), expected) > 1e-2
    assert relative(result, expected) <= 1e-5


def copy_into_peft(model: nn.Module, peft: PeftModel, name: str = "default") -> None:
    """Give PEFT's adapter the values of ours."""
    own = dict(peft.named_parameters())
    with torch.no_grad():
        for fqn, site in storage.sites(model):
            if name in site.lora_arithmetic:
                for key, value in storage.tensors(site, name).items():
                    target = key.replace(".weight", f".{name}.weight")
                    own[f"{PREFIX}{fqn}.{target}"].copy_(value)


def compiled(text: str, base: nn.Module | None = None, **settings: Any) -> nn.Module:
    return lora_fx.compile(base or llama(4), f"lora 1\n{text}", backend=None, **settings)
