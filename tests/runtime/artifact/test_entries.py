"""The programs of entries: what each kind of model is called with, and that it runs."""

from typing import Any

import pytest
import torch

from lora_fx import LoraFxError
from lora_fx.diagnostics import Source, Span
from lora_fx.runtime.artifact.entries import programs
from lora_fx.spec.spec import EntrySpec
from tests.architectures import ARCHITECTURES
from tests.plan.models import Tower
from tests.tiny import llama

HERE = Span(Source("a.lora", ""), 0, 0)


def entry(name: str, batch: int = 2, sequence: int = 8) -> EntrySpec:
    return EntrySpec(name, batch, sequence, HERE)


def calls(model: Any, name: str) -> list[dict[str, Any]]:
    """What the model's forward is called with, each program's first call."""
    found: list[dict[str, Any]] = []
    forward = model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        found.append({"training": model.training, "grad": torch.is_grad_enabled(), **kwargs})
        return forward(*args, **kwargs)

    first = []
    for program in programs(model, entry(name)):
        model.forward = spy
        count = len(found)
        program()
        first.append(found[count])
        del model.forward
    return first


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_training_step_of_every_kind_of_model(name: str) -> None:
    model = ARCHITECTURES[name]()
    for call in calls(model, "train"):
        assert call["training"]
        assert call["grad"]
        sizes = {t.shape[0] for t in call.values() if isinstance(t, torch.Tensor)}
        assert sizes == {2}
    assert all(p.grad is None for p in model.parameters())


def test_how_trainer_and_trl_call_a_model() -> None:
    found = calls(llama(2), "train")
    assert [call.get("use_cache") for call in found] == [None, None, False, False]
    assert [int(call["attention_mask"].sum()) for call in found] == [16, 15, 16, 15]
    assert all(call["input_ids"].shape == (2, 8) for call in found)
    assert all(torch.equal(call["labels"], call["input_ids"]) for call in found)
    assert not {0, 1, 2} & set(found[0]["input_ids"].unique().tolist())  # no padding, no ends


def test_an_evaluation() -> None:
    for call in calls(llama(2), "forward"):
        assert not call["training"]
        assert not call["grad"]


@pytest.mark.parametrize("name", ["llama", "t5", "whisper", "llava", "mamba2"])
def test_generation(name: str) -> None:
    model = ARCHITECTURES[name]()
    found = calls(model, "generate")
    assert not any(call["training"] or call["grad"] for call in found)
    if name == "llama":
        assert [call["input_ids"].shape[1] for call in found] == [8, 8, 4, 4]
        assert int(found[1]["attention_mask"].sum()) == 15
        assert int(found[1]["attention_mask"][0, 0]) == 0


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [
        (lambda: Tower(), "train", "does not say what its inputs are"),
        (lambda: ARCHITECTURES["bert"](), "generate", "does not generate"),
        (lambda: llama(2).model, "generate", "does not generate"),
    ],
)
def test_what_cannot_be_run(model: Any, name: str, why: str) -> None:
    with pytest.raises(LoraFxError, match="entry-impossible") as raised:
        programs(model(), entry(name))
    assert why in str(raised.value)
