"""The pipeline on a GPU; run with `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import lora_fx
from lora_fx.compiler import pipeline
from tests.dense import relative
from tests.runtime.mixed import alone, mixed
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


@pytest.mark.parametrize("layout", ["plain", "augmented"])
def test_large_batches_are_as_precise_as_the_marked_model(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(rewrite):
        def run(graph):
            made.extend([rewrite.__name__] * rewrite(graph))
            return 0

        run.__name__ = f"counted_{rewrite.__name__}"
        return run

    for name in ("PLAIN", "AUGMENTED"):
        monkeypatch.setattr(pipeline, name, tuple(map(counted, getattr(pipeline, name))))
    base = llama(2, hidden_size=1024, intermediate_size=2048).bfloat16()
    text = spec().replace("unit", f"layout = {layout}  unit")
    model = lora_fx.compile(base, text).cuda()
    marked = lora_fx.compile(base, text, backend=None).cuda()
    torch.manual_seed(1)
    ids = torch.randint(1, 101, (2, 8192), device="cuda")
    got, plain = step(model, ids), step(marked, ids)
    exact = step(marked.double(), ids)
    errors = [sum(relative(one[name], exact[name]) for name in exact) for one in (got, plain)]
    assert 0 < errors[0] < 1.2 * errors[1]
    wanted = {
        "accumulate_products",
        "share_gradient_reads",
        "fuse_low_rank_terms",
        "keep_float32",
    }
    assert set(made) == wanted | ({"augment_products"} if layout == "augmented" else set())


SERVED = """lora 1
adapter a { rank = 4 alpha = 6 init = random target linear }
adapter b { rank = 3 init = random target linear }
route { slots = 4 }
"""


@pytest.mark.parametrize("unit", ["layers", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_samples_whose_factors_kernels_pick(unit: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """They are what each is alone; the base's are bit for bit."""
    graphs = 'mode = "reduce-overhead"' if unit == "model" else ""
    text = f"{SERVED} compile {{ unit = {unit} {graphs} }}"
    model = mixed(text).to("cuda", dtype)
    model.save_pretrained(tmp_path)
    for name in ("c", "d"):
        model.load_adapter(tmp_path / "b", name)
    names = ["c", "a", "__base__", "b", "d", "a"]
    for length in (1, 70):
        ids = tokens(len(names), length).cuda()
        assert "picked" in lora_fx.capture(model, input_ids=ids, adapter_names=names).text("fused")
        got = model(input_ids=ids, adapter_names=names).logits.clone()
        for i, name in enumerate(names):
            want = alone(model, name, input_ids=ids[i : i + 1])[0]
            assert relative(got[i], want) < max(1e-5, 6 * torch.finfo(dtype).eps), name
        others = ["a", *names[1:]]
        before = counters["stats"]["unique_graphs"]
        other = model(input_ids=ids, adapter_names=others).logits
        assert relative(other[0], got[0]) > 1e-2
        assert torch.equal(other[1:], got[1:])
        assert counters["stats"]["unique_graphs"] == before
        base = model(input_ids=ids, adapter_names=["__base__"] * len(ids)).logits
        assert torch.equal(base[2], got[2])
