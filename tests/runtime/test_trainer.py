"""`Trainer` takes the compiled model as it takes any other."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import lora_fx
from tests.adapters.peft.both import assert_same_logits, from_folder
from tests.dense import relative
from tests.runtime.trainer import base, loss, trainer
from tests.tiny import spec

PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors", "spec.lora"}
DROPOUT = "rank = 4 alpha = 6 dropout = 0.2"


PLAIN = "rank = 4 alpha = 6"


def compiled(adapter: str = PLAIN, model: nn.Module | None = None) -> nn.Module:
    return lora_fx.compile(model or base(), spec(adapter=adapter), backend="eager")


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was logged as a warning or worse so far."""
    transformers.utils.logging.enable_propagation()
    yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    transformers.utils.logging.disable_propagation()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_loss_falls_and_only_adapters_are_written(tmp_path: Path) -> None:
    model = compiled()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(model, tmp_path, max_steps=12)
    first = loss(run)
    run.train()
    assert loss(run) < 0.9 * first
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained(model).keys()
    checkpoint = tmp_path / "checkpoint-2"
    assert PEFT_FILES | {"model.safetensors", "optimizer.pt"} <= names(checkpoint)
    assert "config.json" not in names(checkpoint)
    assert load_file(checkpoint / "model.safetensors").keys() == trained(model).keys()
    run.save_model(str(tmp_path / "final"))
    assert names(tmp_path / "final") == PEFT_FILES | {"README.md", "training_args.bin"}
    assert_same_logits(from_folder(tmp_path / "final", base()), model)
    assert_same_logits(lora_fx.load(tmp_path / "final", base(), backend=None), model)
    assert_same_logits(from_folder(tmp_path / "checkpoint-12", base()), model)


def test_resuming_is_the_unbroken_run(tmp_path: Path, warned: Callable[[], list[str]]) -> None:
    unbroken = compiled(DROPOUT)
    trainer(unbroken, tmp_path).train()
    resumed = compiled(DROPOUT)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert warned() == []
    want = trained(unbroken)
    assert all(torch.equal(tensor, want[name]) for name, tensor in trained(resumed).items())
    state = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert max(relative(state[name], want[name]) for name in want) > 1e-2


def test_resuming_with_another_adapter_is_warned_of(
    tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    trainer(compiled(), tmp_path, max_steps=1, save_steps=1).train()
    text = spec() + "adapter two { rank = 2 target q_proj }"
    other = lora_fx.compile(base(), text, backend="eager")
    run = trainer(other, tmp_path, max_steps=2, save_strategy="no")
    with pytest.raises(ValueError, match="parameter group"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert any("missing keys" in message for message in warned())


def test_dropout_changes_the_run(tmp_path: Path) -> None:
    runs = []
    for adapter in (PLAIN, DROPOUT):
        run = trainer(compiled(adapter), tmp_path, save_strategy="no", max_steps=2)
        run.train()
        runs.append(run.state.log_history[0]["loss"])
    assert runs[0] != runs[1]


def test_the_best_model_comes_back(tmp_path: Path, warned: Callable[[], list[str]]) -> None:
    model = compiled()
    run = trainer(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=0.3,
        lr_scheduler_type="constant",
    )
    run.train()
    assert warned() == []
    best = Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    state = load_file(best / "model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained(model).items())
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-6)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = compiled(DROPOUT)
    trainer(plain, tmp_path, save_strategy="no").train()
    want = trained(plain)
    for reentrant in (False, True):
        model = compiled(DROPOUT)
        trainer(
            model,
            tmp_path,
            save_strategy="no",
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        ).train()
        assert model.is_activation_checkpointing
        assert all(relative(t, want[name]) <= 1e-5 for name, t in trained(model).items())


def test_gradient_accumulation_and_a_smaller_last_batch(tmp_path: Path) -> None:
    """Thirteen samples by four: the last batch has one; against the marked model."""
    results = []
    for backend in ("eager", None):
        model = lora_fx.compile(base(), spec(), backend=backend)
        run = trainer(
            model,
            tmp_path,
            save_strategy="no",
            max_steps=-1,
            num_train_epochs=2,
            gradient_accumulation_steps=2,
        )
        run.train()
        results.append(trained(model))
    got, want = results
    assert all(relative(got[name], tensor) <= 1e-5 for name, tensor in want.items())


def test_several_adapters(tmp_path: Path) -> None:
    text = spec() + "adapter two { rank = 2 init = random seed = 4 target q_proj }"
    model = lora_fx.compile(base(), text, backend=None)
    model.set_adapter(["default", "two"])
    before = trained(model)
    trainer(model, tmp_path).train()
    assert min(relative(tensor, before[name]) for name, tensor in trained(model).items()) > 1e-3
    assert (tmp_path / "checkpoint-4" / "two" / "adapter_config.json").exists()
    resumed = lora_fx.compile(base(), text, backend=None)
    resumed.set_adapter(["default", "two"])
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    want = trained(model)
    assert all(torch.equal(tensor, want[name]) for name, tensor in trained(resumed).items())


def test_an_outer_compile_is_named(tmp_path: Path) -> None:
    run = trainer(
        compiled(),
        tmp_path,
        save_strategy="no",
        max_steps=1,
        torch_compile=True,
        torch_compile_backend="eager",
    )
    with pytest.warns(UserWarning, match=r"leave out the torch\.compile around it"):
        run.train()


def test_a_4bit_base(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")

    def quantised() -> nn.Module:
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)

    with pytest.raises(ValueError, match="purely quantized"):
        trainer(quantised(), tmp_path)
    model = compiled(model=quantised())
    assert model.is_quantized
    run = trainer(model, tmp_path, max_steps=12, save_steps=6)
    first = loss(run)
    run.train()
    assert loss(run) < 0.9 * first
    resumed = compiled(model=quantised())
    again = trainer(resumed, tmp_path, max_steps=12, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    want = trained(model)
    assert all(torch.equal(tensor, want[name]) for name, tensor in trained(resumed).items())
