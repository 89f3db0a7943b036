"""`variant = bdlora`: how its blocks start, that they share shrinks, and what is refused."""

import math

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.sites.magnitudes import effective_delta
from tests.adapters.kinds import scatter
from tests.dense import relative
from tests.tiny import assert_equal, llama, step, tokens

BLOCKS = 'variant = bdlora(a = ["down_proj", "q_proj"], b = ["up_proj", "k_proj"], blocks = 2)'
TARGETS = "target q_proj, k_proj, up_proj, down_proj"


def compiled(backend: str | None = None, init: str = "default", more: str = TARGETS) -> nn.Module:
    text = f"lora 1 adapter default {{ rank = 4  {BLOCKS}  init = {init}  {more} }}"
    return lora_fx.compile(llama(1), text, backend=backend)


@pytest.mark.parametrize(("init", "slope"), [("default", 0), ("random", math.sqrt(5))])
def test_blocks_are_drawn_for_their_own_inputs(init: str, slope: float) -> None:
    """He et al. 2015: uniform to √(6 / ((1 + slope²) n)), and as wide as that."""
    model = compiled(init=init)
    for name, inputs in (("mlp.down_proj", 22), ("self_attn.q_proj", 16)):
        A, B = storage.tensors(model.get_submodule(f"model.layers.0.{name}"), "default").values()
        bound = math.sqrt(6 / ((1 + slope**2) * inputs))
        assert A.shape[1] == inputs
        assert 0.9 * bound < A.abs().max() <= bound
        assert bool(B.any()) == (init == "random")
    A, B = storage.tensors(model.model.layers[0].mlp.up_proj, "default").values()
    assert A.shape == (4, 32)
    assert B.shape == (44, 2)
    assert 0.9 / math.sqrt(32) < A.abs().max() <= 1 / math.sqrt(32)


def test_a_step_of_inductor() -> None:
    """With shrinks shared by q and k, of which one has blocks."""
    models = [compiled(backend, "random") for backend in ("inductor", "eager", None)]
    for model in models:
        scatter(model)
    want = step(models[-1], tokens())
    for model in models[:-1]:
        assert_equal(step(model, tokens()), want)
    program = lora_fx.capture(models[1], input_ids=tokens())
    q, k = "self_attn.q_proj.lora_A.default.weight", "self_attn.k_proj.lora_A.default.weight"
    adapted, fused = (program.text(stage) for stage in ("adapted", "fused"))
    assert f"block_diagonal(@{q}, 2)" in adapted.replace("model.layers.0.", "")
    assert k in adapted
    assert fused.count("lora_fx.shrink(") == adapted.count("lora_fx.shrink(") - 1


def test_the_effective_delta_has_blocks() -> None:
    model = compiled(init="random")
    site = model.model.layers[0].mlp.down_proj
    A, B = storage.tensors(site, "default").values()
    whole = torch.zeros(4, 44)
    whole[:2, :22], whole[2:, 22:] = A[:2], A[2:]
    scaling = site.lora_arithmetic["default"].scaling
    assert relative(effective_delta(site, "default"), scaling * B @ whole) < 1e-6


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (f"{TARGETS} target v_proj", r"`bdlora\(strict = true\)` names every module"),
        (f"{TARGETS} target o_proj {{ variant = lora }}", "`bdlora` at some modules of an adapter"),
        (f"init = olora {TARGETS}", "init `olora` and variant `bdlora` do not go together"),
        (f"lora_bias = true {TARGETS}", "`lora_bias` and variant `bdlora` do not go together"),
    ],
)
def test_what_is_refused(adapter: str, message: str) -> None:
    text = f"lora 1 adapter default {{ rank = 4  {BLOCKS}  {adapter} }}"
    with pytest.raises(lora_fx.LoraFxError, match=message):
        lora_fx.compile(llama(1), text, backend=None)
