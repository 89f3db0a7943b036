"""`variant = velora`: training beside PEFT, and what is kept of the inputs."""

import warnings
from typing import Any

import pytest
import torch
from peft import VeloraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lora_fx
from lora_fx.adapters.peft.keys import live_tensors
from tests.adapters.kinds import PREFIX, Kind, by_peft, of, scatter, state_of, step_of_peft
from tests.architectures import LAYERS
from tests.dense import relative
from tests.example_inputs import example_inputs
from tests.tiny import assert_equal, graphs, llama, step, tokens

TARGETS = ["q_proj", "down_proj"]


def kind(groups: int, init: str, scale: float = 1.5) -> Kind:
    """44 inputs of `down_proj` are no multiple of 5 groups, 32 of `q_proj` neither."""
    text = f"velora(num_groups = {groups}, scale = {scale}, init_type = {init})"
    config = VeloraConfig(num_groups=groups, scale=scale, init_type=init)
    return Kind(
        of("llama"),
        f"variant = {text}  target {', '.join(TARGETS)}",
        {"target_modules": TARGETS, "velora_config": config},
    )


def compiled(kind: Kind, backend: str | None = None) -> Any:
    text = f"lora 1 adapter default {{ rank = 3  alpha = 5  init = random  {kind.adapter} }}"
    model = lora_fx.compile(kind.base(), text, backend=backend)
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(model: Any) -> dict[str, Tensor]:
    """Gradients and buffers after a step in training mode, by their names in a file."""
    model.train().zero_grad()
    inputs = example_inputs(model)
    loss = model(**inputs).loss
    loss.backward()
    live = live_tensors(model, "default").items()
    return {"loss": loss.detach()} | {
        f"{PREFIX}{n}": t.grad.clone() if t.requires_grad else t.clone() for n, t in live
    }


def trained_by_peft(model: Any) -> dict[str, Tensor]:
    model.train()
    result = step_of_peft(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    buffers = {key: tensor for key, tensor in state.items() if "velora" in key}
    return {"loss": result["loss"], **{k: v for k, v in result.items() if "lora" in k}, **buffers}


@pytest.mark.parametrize("groups", [4, 5])
@pytest.mark.parametrize("init", ["batch_average", "batch_average_once", "random"])
def test_two_steps_beside_peft(groups: int, init: str) -> None:
    ours = compiled(kind(groups, init))
    theirs = by_peft(kind(groups, init), state_of(ours))
    for number in range(2):
        got, want = trained(ours), trained_by_peft(theirs)
        assert got.keys() == want.keys()
        assert len([key for key in got if "velora_embed" in key]) == 2 * LAYERS
        for key, tensor in want.items():
            assert tensor.norm() > 0, key
            assert relative(got[key], tensor) < 1e-5, (number, key)
        with torch.no_grad():
            for model in (ours, theirs):
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad and "lora_A" in name:
                        parameter.mul_(1.1)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def adapted(backend: str | None) -> Any:
    text = """lora 1
    adapter default {
      rank = 2  init = random
      variant = velora(num_groups = 4, scale = 0.5)
      target up
    }"""
    model = lora_fx.compile(Two(), text, backend=backend)
    scatter(model)
    return model.train()


@pytest.mark.parametrize("backend", [None, "eager"])
def test_the_gradients(backend: str | None) -> None:
    """dx is exact, and dA is of the reconstruction: Miles et al. 2024, eq. 4."""
    model, x = adapted(backend), torch.randn(5, 10, requires_grad=True)
    y = model(x)
    dy = torch.randn(5, 7)
    y.backward(dy)
    site = model.up
    A, B = site.lora_A["default"].weight, site.lora_B["default"].weight
    s = site.lora_arithmetic["default"].scaling
    assert relative(x.grad, dy @ (site.weight + s * B @ A)) < 1e-6
    groups = torch.cat([x.detach(), torch.zeros(5, 2)], 1).view(5, 4, 3)
    v = groups.mean((0, 1)) / groups.mean((0, 1)).norm()
    assert relative(site.lora_velora_embed["default"].weight, v) < 1e-6
    kept = 0.5 * ((groups @ v)[..., None] * v).view(5, 12)[:, :10]
    assert relative(A.grad, s * (dy @ B).T @ kept) < 1e-5
    assert relative(A.grad, s * (dy @ B).T @ x.detach()) > 0.1
    assert relative(B.grad, s * dy.T @ (x.detach() @ A.T)) < 1e-6


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_nothing_of_the_size_of_the_input_is_kept(backend: str | None) -> None:
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.numel())
        return tensor

    model, plain = adapted(backend), lora_fx.compile(Two(), PLAIN, backend=backend).train()
    for one in (model, plain):
        kept.clear()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            one(torch.randn(11, 10))
        assert (110 in kept) == (one is plain)
    assert len(kept) > 0


PLAIN = "lora 1 adapter default { rank = 2  init = random  target up }"


def test_a_step_of_inductor_and_no_more_graphs() -> None:
    text = """lora 1 adapter default {
      rank = 3  init = random  variant = velora(num_groups = 5)  target linear
    }"""
    models = [lora_fx.compile(llama(2), text, backend=b) for b in ("inductor", "eager", None)]
    for _ in range(2):
        want = step(models[-1], tokens())
        for model in models[:-1]:
            assert_equal(step(model, tokens()), want)
            for name, buffer in models[-1].named_buffers():
                if "velora" in name:
                    assert relative(model.get_buffer(name), buffer) < 1e-5
    before = graphs()
    step(models[1], tokens())
    assert graphs() == before


def test_it_learns_nothing_without_gradients_or_in_evaluation() -> None:
    model = adapted(None)
    v = model.up.lora_velora_embed["default"].weight
    before = v.clone()
    with torch.no_grad():
        model(torch.randn(5, 10))
    model.eval()(torch.randn(5, 10)).sum().backward()
    assert torch.equal(v, before)
    model.train()(torch.randn(5, 10))
    assert not torch.equal(v, before)
