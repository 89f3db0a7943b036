"""`layout = plain` and `augmented`, compiled with every sum rewritten, beside the marked model."""

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import lora_fx
from lora_fx import compiler
from lora_fx.passes.aten import accumulate_products as sums
from tests.tiny import SIZES, assert_differ, assert_equal, llama, step, tokens

TEXT = """lora 1
adapter sql { rank = 3 alpha = 6 init = random target linear except lm_head }
adapter style { rank = 2 alpha = 5 init = random target q_proj, up_proj, down_proj }
"""


@pytest.fixture(autouse=True)
def small_sums_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rewrite sums of any size, and let no cache bring back what was compiled otherwise."""
    monkeypatch.setattr(sums, "_LEAST", 0)
    with torch.compiler.config.patch(cache_key_tag="sums of any size"):
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many changes each pass has made."""
    counts = {rewrite.__name__: 0 for rewrite in compiler.ATEN}

    def counted(rewrite):
        def run(graph):
            counts[rewrite.__name__] += rewrite(graph)
            return 0

        run.__name__ = rewrite.__name__
        return run

    monkeypatch.setattr(compiler, "ATEN", tuple(map(counted, compiler.ATEN)))
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
