"""A model with our adapter's tensors in PEFT, and what is compared of both."""

import warnings
from collections.abc import Mapping

import pytest
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.dense import relative

PREFIX = "base_model.model."


def by_peft(ours: PreTrainedModel, base: PreTrainedModel) -> nn.Module:
    """PEFT on a base, which has its layers repeated already, with the tensors of our adapter.

    It is not told the model's type, for which it has rules of its own: about stacked experts that
    would take single layers of the same name with them, and about state space models.
    """
    config = ours.peft_config["default"] | {"inference_mode": False}
    unset = {"task_type": None, "layer_replication": None}
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        patch.setattr(type(base.config), "model_type", "unnamed")
        theirs = get_peft_model(base, LoraConfig(**config | unset))
    state = ours.get_adapter_state_dict("default")
    assert not set_peft_model_state_dict(theirs, state).unexpected_keys
    return theirs.to(base.dtype)


def step(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return loss, outputs and all gradients, by our names."""
    result = model(**inputs)
    result.loss.backward()
    outputs = {k: result[k].detach() for k in result if k == "loss" or k.endswith("logits")}
    named = ((n.removeprefix(PREFIX), p.grad) for n, p in model.named_parameters())
    return outputs | {n.replace(".base_layer", ""): g for n, g in named if g is not None}


def generate(model: nn.Module, inputs: Mapping[str, Tensor], **settings: str) -> Tensor:
    """Return eight tokens for each sample."""
    given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    return model.generate(**given, max_new_tokens=8, min_new_tokens=8, do_sample=False, **settings)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    assert len(wanted) >= 6
    for key, tensor in wanted.items():
        assert tensor.norm() > 0, key
        assert relative(got[key], tensor) < tolerance, (key, relative(got[key], tensor))
