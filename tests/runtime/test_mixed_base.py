"""A batch in which no sample has an adapter: it is what the base computes, and costs as much."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import lora_fx
from lora_fx.diagnostics import LoraFxError
from tests.dense import relative
from tests.runtime import test_mixed_experts as experts
from tests.runtime import test_mixed_own as own
from tests.runtime.mixed import NAMES, SPEC, alone, mixed, samples
from tests.runtime.test_attention import VIT, compiled, images, vit
from tests.tiny import llama, tokens

BASE = "__base__"
PISSA = """lora 1
adapter p { rank = 4 init = pissa target q_proj, up_proj }
adapter a { rank = 3 init = random target o_proj }
route { }
"""
EMBEDDED = """lora 1
adapter a { rank = 4 init = random target embed_tokens, q_proj }
adapter c { rank = 2 init = random target v_proj  tokens [3, 7] }
route { }
"""


def text_of(model: Any, names: list[str], stage: str = "adapted", **inputs: Any) -> str:
    inputs = inputs or {"input_ids": samples(len(names))}
    return lora_fx.capture(model, adapter_names=names, **inputs).text(stage)


@pytest.mark.parametrize("unit", ["layers", "model"])
@torch.no_grad()
def test_its_graph_has_nothing_of_an_adapter(unit: str) -> None:
    model = mixed(f"{SPEC} compile {{ unit = {unit} }}")
    assert "lora_fx." not in text_of(model, [BASE] * 4)
    assert "lora_fx." in text_of(model, [BASE, BASE, "a", BASE])


@pytest.mark.parametrize("backend", [None, "inductor"])
@torch.no_grad()
def test_it_is_the_base_bit_for_bit(backend: str | None) -> None:
    model, ids = mixed(backend=backend), samples()
    got = model(input_ids=ids, adapter_names=[BASE] * len(ids)).logits
    by_rows = model(input_ids=ids, adapter_indices=torch.full((len(ids),), -1)).logits
    with model.disable_adapter():
        assert torch.equal(got, model(input_ids=ids).logits)
    assert torch.equal(by_rows, got)
    assert not torch.equal(model(input_ids=ids, adapter_names=NAMES).logits, got)


@torch.no_grad()
def test_it_is_compiled_once() -> None:
    model, ids = mixed(), samples()
    mixes = [NAMES, [BASE] * len(NAMES), NAMES[::-1], [BASE] * 3, NAMES[:5]]
    wanted = [alone(model, BASE, input_ids=ids[:3]), alone(model, BASE, input_ids=ids)]
    for names in mixes:
        model(input_ids=ids[: len(names)], adapter_names=names)
    before = counters["stats"]["unique_graphs"]
    got = [model(input_ids=ids[: len(names)], adapter_names=names).logits for names in mixes]
    assert counters["stats"]["unique_graphs"] == before
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[3], wanted[0])


@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_modules_and_rows_that_adapters_train_are_the_base_s(backend: str | None) -> None:
    model = own.mixed(backend)
    if backend is not None:
        assert "lora_fx." not in text_of(model, [BASE] * 6, input_ids=own.IDS)
    got = own.routed(model, [BASE] * 6)
    with model.disable_adapter():
        assert torch.equal(got, model(input_ids=own.IDS).logits)
    assert not torch.equal(own.routed(model)[0], got[0])
    model.set_adapter("c")
    assert not torch.equal(model(input_ids=own.IDS).logits, got)


@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_an_embedding_with_factors_and_rows(backend: str | None) -> None:
    model, ids = mixed(EMBEDDED, backend=backend), samples(3)
    ids[:, 1] = 7
    got = model(input_ids=ids, adapter_names=["a", "c", BASE]).logits
    base = model(input_ids=ids, adapter_names=[BASE] * 3).logits
    for i, name in enumerate(("a", "c", BASE)):
        assert relative(got[i], alone(model, name, input_ids=ids[i : i + 1])[0]) < 1e-5, name
        assert (relative(got[i], base[i]) > 1e-2) is (name != BASE)
    assert torch.equal(base, alone(model, BASE, input_ids=ids))


@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_experts(backend: str | None) -> None:
    model, ids = experts.mixed(backend=backend), experts.samples(3)
    if backend is not None:
        assert "lora_fx." not in text_of(model, [BASE] * 3, input_ids=ids)
    got = model(input_ids=ids, adapter_names=[BASE] * 3).logits
    assert torch.equal(got, experts.alone(model, BASE, ids))


@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_attention_of_torch(backend: str | None) -> None:
    base = vit()
    model = compiled(base, f"{VIT} route {{ default -> a }}", backend).eval()
    assert torch.equal(model(images(4), adapter_names=[BASE] * 4), base(images(4)))
    assert not torch.equal(model(images(4), adapter_names=["b"] * 4), base(images(4)))


@torch.no_grad()
def test_what_adapters_took_out_of_weights_is_still_added() -> None:
    model, ids = mixed(PISSA, backend="eager"), samples(3)
    want = llama(2).eval()(input_ids=ids).logits
    assert "lora_fx.site" in text_of(model, [BASE] * 3, stage="captured")
    got = model(input_ids=ids, adapter_names=[BASE] * 3).logits
    assert torch.allclose(got, want, rtol=0, atol=1e-5)
    model.delete_adapter("p")
    assert "lora_fx." not in text_of(model, [BASE] * 3)
    got = model(input_ids=ids, adapter_names=[BASE] * 3).logits
    assert torch.equal(got, alone(model, BASE, input_ids=ids))


@torch.no_grad()
def test_generation() -> None:
    model: Any = mixed(backend="eager")
    ids, how = tokens(3, 6), {"max_new_tokens": 4, "do_sample": False}
    want = llama(2).eval().generate(ids, **how)
    mixing: list[bool] = []
    look = model.model.layers[0].register_forward_pre_hook(
        lambda *_: mixing.append(model.lora_fx_routing.mixes)
    )
    got = model.generate(ids, adapter_names=[BASE] * 3, **how)
    assert torch.equal(got, want)
    several = {**how, "num_beams": 3, "num_return_sequences": 2}
    got = model.generate(ids, adapter_names=[BASE] * 3, **several)
    assert torch.equal(got, llama(2).eval().generate(ids, **several))
    assert mixing
    assert not any(mixing)
    model.generate(ids, adapter_names=["a", BASE, BASE], **how)
    look.remove()
    assert mixing[-1]


class OneByOne(nn.Module):
    """Gives a convolution samples without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.conv(one) for one in x])


@torch.no_grad()
def test_what_mixed_batches_cannot_be_it_can() -> None:
    text = "lora 1 adapter a { rank = 2 init = random target conv } route { }"
    base, x = OneByOne(), torch.randn(4, 3, 7)
    model = lora_fx.compile(base, text, backend=None).eval()
    assert torch.equal(model(x, adapter_names=[BASE] * 4), base(x))
    with pytest.raises(LoraFxError, match="one sample without a batch"):
        model(x, adapter_names=["a", BASE, BASE, BASE])


@torch.no_grad()
def test_numbers_of_any_dtype() -> None:
    model, ids = mixed(backend=None), samples(2)
    want = model(input_ids=ids, adapter_names=["a", "b"]).logits
    for dtype in (torch.uint8, torch.int16, torch.int64):
        rows = torch.tensor([0, 1], dtype=dtype)
        assert torch.equal(model(input_ids=ids, adapter_indices=rows).logits, want)


def test_generating_is_no_step_of_training() -> None:
    spec = SPEC.replace("train = true", "")
    model: Any = mixed(spec, backend=None).train()
    ids, names = tokens(2, 5), ["a", BASE]
    got = model.generate(ids, adapter_names=names, max_new_tokens=3, do_sample=False)
    want = model.eval().generate(ids, adapter_names=names, max_new_tokens=3, do_sample=False)
    assert torch.equal(got, want)
    with pytest.raises(LoraFxError, match="is trained, and the spec does not say so"):
        model.train()(input_ids=ids, adapter_names=names)


def test_where_gradients_are_taken_adapters_stay_in_the_graph() -> None:
    """So that a loss of the base's samples can be one term, or all, of an adapter's training."""
    model, ids = mixed(backend=None).train(), samples(3)
    model(input_ids=ids, adapter_names=[BASE] * 3).logits.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


class Unseen(nn.Module):
    """Reads a weight without calling the layer that it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.first(x), self.second.weight)


@torch.no_grad()
def test_it_does_not_stand_in_for_a_mixed_batch_that_has_to_be_watched() -> None:
    text = "lora 1 adapter a { rank = 2 init = random target linear } route { }"
    model, x = lora_fx.compile(Unseen(), text, backend=None).eval(), torch.randn(3, 5)
    model(x, adapter_names=[BASE] * 3)
    with pytest.raises(LoraFxError, match="without calling it"):
        model(x, adapter_names=["a", BASE, BASE])
