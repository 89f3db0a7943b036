"""`layout = plain` and `augmented`, compiled with every sum rewritten, beside the marked model."""

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import lora_fx
from lora_fx.compiler import pipeline
from lora_fx.graph.room import ROOM
from lora_fx.passes.aten import accumulate_products as sums
from tests.tiny import SIZES, assert_differ, assert_equal, llama, step, tokens, uncached

TEXT = """lora 1
adapter sql { rank = 3 alpha = 6 init = random target linear except lm_head }
adapter style { rank = 2 alpha = 5 init = random target q_proj, up_proj, down_proj }
"""


@pytest.fixture(autouse=True)
def small_sums_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rewrite sums of any size, and let no cache bring back what was compiled otherwise."""
    monkeypatch.setattr(sums, "_LEAST", 0)
    with uncached():
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many changes each pass has made."""
    counts = {rewrite.__name__: 0 for rewrite in pipeline.AUGMENTED}

    def counted(rewrite):
        def run(graph):
            counts[rewrite.__name__] += rewrite(graph)
            return 0

        run.__name__ = rewrite.__name__
        return run

    for name in ("PLAIN", "AUGMENTED"):
        monkeypatch.setattr(pipeline, name, tuple(map(counted, getattr(pipeline, name))))
    return counts


def qwen2(layers: int) -> PreTrainedModel:
    """Its attention has biases."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, num_key_value_heads=2, **SIZES))


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (llama, "layout = plain"),
        (llama, "layout = augmented"),
        pytest.param(llama, "layout = augmented  unit = model", marks=pytest.mark.slow),
        pytest.param(llama, "layout = augmented  checkpoint = layers", marks=pytest.mark.slow),
        pytest.param(qwen2, "layout = augmented", marks=pytest.mark.slow),
    ],
    ids=["plain", "augmented", "whole-model", "checkpointed", "biases"],
)
def test_steps_and_tokens(base, settings: str, made: dict[str, int]) -> None:
    base = base(1)
    text = f"{TEXT} compile {{ {settings} }}"
    model = lora_fx.compile(base, text)
    marked = lora_fx.compile(base, text, backend=None)
    before = {}
    for active in ("sql", ["sql", "style"]):
        for m in (model, marked):
            m.set_adapter(active)
        got, want = step(model, tokens()), step(marked, tokens())
        assert_equal(got, want, 2e-5)
        if before:
            assert_differ(before.values(), {k: want[k] for k in before}.values())
        before = want
    assert made["accumulate_products"] > 0
    assert (made["augment_products"] > 0) == ("augmented" in settings)
    model.eval(), marked.eval()
    with torch.no_grad():
        assert torch.allclose(model(tokens()).logits, marked(tokens()).logits, atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(model(tokens()).logits, base(tokens()).logits, atol=1e-5)


def test_the_given_model_keeps_its_weights() -> None:
    base = llama(1)
    before = {name: (p.data_ptr(), p.clone()) for name, p in base.named_parameters()}
    model = lora_fx.compile(base, f"{TEXT} compile {{ layout = augmented }}")
    step(model, tokens())
    for name, parameter in base.named_parameters():
        place, value = before[name]
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, value)
        assert torch.equal(model.get_parameter(name), value)


def test_a_foreign_view_with_such_strides_is_not_written_beside() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big = torch.randn(8, 8 + ROOM)
            self.a, self.b = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(ROOM, 8, bias=False)
            self.a.weight = torch.nn.Parameter(self.big[:, :8])
            self.b.weight = torch.nn.Parameter(self.big[:, 8:])

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return self.a(torch.tanh(x)) + self.b(z)

    base, x, z = Two(), torch.randn(5, 8), torch.randn(5, ROOM)
    want, before = base(x, z), base.big.clone()
    for layout in ("plain", "augmented"):
        text = f"""lora 1
        adapter x {{ rank = 2 init = random target linear }}
        compile {{ layout = {layout} }}"""
        model = lora_fx.compile(base, text)
        model(x, z).sum().backward()
        assert torch.equal(base.big, before)
        assert torch.equal(base(x, z), want)
        marked = lora_fx.compile(base, text, backend=None)
        assert torch.allclose(model(x, z), marked(x, z), atol=1e-5)


class Chain(torch.nn.Module):
    """Two layers of one input with two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(6, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)
        return torch.cat([self.q(x), self.k(x)], 1)


@pytest.mark.parametrize("more", ["", "lora_bias = true"])
def test_two_dimensions_and_sizes_that_change(more: str, made: dict[str, int]) -> None:
    text = f"""lora 1
    adapter x {{ rank = 2 init = random {more} target linear }}
    compile {{ layout = augmented }}"""
    model, marked = (lora_fx.compile(Chain(), text, backend=b) for b in ("inductor", None))
    for size in (5, 9, 4):
        x = torch.randn(size, 6)
        assert torch.allclose(model(x), marked(x), atol=1e-5)
        grads = []
        for one in (model, marked):
            one.zero_grad()
            one(x).square().sum().backward()
            grads.append([p.grad.clone() for p in one.parameters() if p.requires_grad])
        for got, want in zip(*grads, strict=True):
            assert torch.allclose(got, want, atol=1e-4)
    assert made["augment_products"] >= 2
