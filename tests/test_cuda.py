"""The pipeline on a GPU; run with `pytest -m gpu`."""

import pytest
import torch

import lora_fx
from tests.tiny import assert_equal, checkpointing, generate, llama, spec, step, tokens

# Inductor warns of what it could do better.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("unit", ["layers", "model"])
def test_inductor_equals_the_marked_model(unit: str) -> None:
    base = llama(4)
    model = lora_fx.compile(base, spec(unit)).cuda()
    marked = lora_fx.compile(base, spec(unit), backend=None).cuda()
    assert model.model.layers[0].self_attn.q_proj.lora_scalings.is_cuda
    assert base.device.type == "cpu"
    for samples in (3, 2):
        ids = tokens(samples).cuda()
        assert_equal(step(model, ids), step(marked, ids), 2e-5)
    for settings in ({}, {"cache_implementation": "static"}):
        got = generate(model.eval(), tokens().cuda(), **settings)
        assert torch.equal(got, generate(marked.eval(), tokens().cuda(), **settings))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    base = llama(4)
    model = lora_fx.compile(base, spec()).cuda()
    marked = lora_fx.compile(base, spec(), backend=None).cuda()
    for m in (model, marked):
        checkpointing(m, reentrant)
    for ids in (tokens(3).cuda(), tokens(2).cuda(), tokens(3).cuda()):
        assert_equal(step(model, ids), step(marked, ids), 2e-5)


@pytest.mark.parametrize(
    ("mode", "unit"), [("reduce-overhead", "model"), ("max-autotune-no-cudagraphs", "layers")]
)
def test_modes(mode: str, unit: str) -> None:
    base = llama(2)
    text = spec(unit).replace("unit", f'mode = "{mode}"  unit')
    model = lora_fx.compile(base, text).cuda().eval()
    marked = lora_fx.compile(base, text, backend=None).cuda().eval()
    with torch.no_grad():
        for _ in range(3):
            got, want = model(tokens().cuda()).logits.clone(), marked(tokens().cuda()).logits
        assert torch.allclose(got, want, atol=1e-5)
