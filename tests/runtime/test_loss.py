"""The compiled loss is transformers' own, and stores no float32 tensor of the logits' size."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from transformers import LlamaForSequenceClassification
from transformers.loss.loss_utils import ForCausalLMLoss

import lora_fx
from lora_fx.runtime.loss import TokenLosses
from tests.dense import relative
from tests.runtime.artifact.made import BATCH, LENGTH, build, one_program_each, text
from tests.runtime.trainer import trainer
from tests.tiny import assert_equal, graphs, llama, spec, step, tokens

SAMPLES, TOKENS, WORDS = 3, 17, 211
Loss = Callable[..., Tensor]


@pytest.fixture(scope="module")
def loss() -> Loss:
    return lora_fx.compile(llama(2), spec()).loss_function


def inputs(dtype: torch.dtype = torch.float32, samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """Logits that are sure of something, and labels of which some do not count."""
    generator = torch.Generator().manual_seed(samples)
    logits = 3 * torch.randn(samples, TOKENS, WORDS, generator=generator)
    labels = torch.randint(0, WORDS, (samples, TOKENS), generator=generator)
    labels[0, :6] = labels[-1, -2:] = -100
    return logits.to(dtype).requires_grad_(), labels


def run(loss: Loss, logits: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits, *args, WORDS, **kwargs)
    value.backward()
    return {"loss": value.detach(), "gradient": logits.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_items_in_batch": 41},
        {"num_items_in_batch": torch.tensor(43)},
        {"num_items_in_batch": torch.tensor([41.5])},
        {"ignore_index": 7},
        {"shift_labels": torch.arange(SAMPLES * TOKENS).view(SAMPLES, TOKENS)},
        {"output_attentions": True, "cu_seq_lens_q": torch.tensor([0, 3])},
    ],
    ids=str,
)
def test_it_is_the_model_s_own(loss: Loss, settings: dict[str, Any]) -> None:
    logits, labels = inputs()
    labels = labels.where(labels != -100, settings.get("ignore_index", -100))
    want = run(ForCausalLMLoss, logits, labels, **settings)
    assert_equal(run(loss, logits, labels, **settings), want, 1e-6)
    other = run(loss, logits, labels.roll(1, 1), **{**settings, "shift_labels": None})
    assert relative(other["gradient"], want["gradient"]) > 1e-2


def test_labels_of_which_none_counts(loss: Loss) -> None:
    logits, labels = inputs()
    nothing = torch.full_like(labels, -100)
    for one in (loss, ForCausalLMLoss):
        assert one(logits, nothing, WORDS).isnan()
        assert one(logits, nothing, WORDS, num_items_in_batch=5) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_further_from_float64_than_eager(loss: Loss, dtype: torch.dtype) -> None:
    logits, labels = inputs(dtype)
    exact = logits.detach().double().requires_grad_()
    want = nn.functional.cross_entropy(exact[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    want.backward()
    errors = []
    for one in (loss, ForCausalLMLoss):
        got = run(one, logits, labels)
        assert got["loss"].dtype == torch.float32
        errors.append((relative(got["loss"], want), relative(got["gradient"], exact.grad)))  # type: ignore[arg-type]
    (loss_error, gradient_error), (eager_loss, eager_gradient) = errors
    assert loss_error <= eager_loss + 1e-6
    assert gradient_error <= 1.01 * eager_gradient + 1e-6


def test_nothing_of_the_logits_size_is_stored_in_float32() -> None:
    loss = lora_fx.compile(llama(2), spec()).loss_function
    logits, labels = inputs(torch.bfloat16)
    _, codes = run_and_get_code(lambda: run(loss, logits, labels))
    assert len(codes) == 2
    sizes = f"({SAMPLES}, {TOKENS}, {WORDS})"
    made = [line for code in codes for line in code.splitlines() if "= empty_strided" in line]
    large = [line for line in made if str(WORDS) in line]
    assert [line for line in large if sizes not in line or "bfloat16" not in line] == []
    assert len(large) == 1
    kept = {
        name: stored(one, logits, labels)
        for name, one in (("ours", loss), ("eager", ForCausalLMLoss))
    }
    assert kept["ours"] == {torch.bfloat16: 1}
    assert kept["eager"][torch.float32] >= 1


def stored(loss: Loss, logits: Tensor, labels: Tensor) -> dict[torch.dtype, int]:
    """How many tensors of the logits' size the backward pass is given, by dtype."""
    found: dict[torch.dtype, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == logits.numel():
            found[tensor.dtype] = found.get(tensor.dtype, 0) + 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(logits, labels, WORDS)
    return found


def test_it_is_one_graph_of_a_model() -> None:
    model = lora_fx.compile(llama(5), spec())
    marked = lora_fx.compile(llama(5), spec(), backend=None)
    before = graphs()
    assert_equal(step(model, tokens()), step(marked, tokens()), 1e-5)
    assert graphs() - before == 3
    step(model, tokens(2))
    before = graphs()
    for samples, items in ((4, None), (5, 17), (6, torch.tensor(19)), (7, 18)):
        ids = tokens(samples)
        got, want = (
            m(input_ids=ids, labels=ids, num_items_in_batch=items).loss for m in (model, marked)
        )
        assert torch.allclose(got, want, rtol=1e-5)
    assert graphs() == before
    with torch.no_grad():
        assert torch.allclose(*(m(input_ids=ids, labels=ids).loss for m in (model, marked)))
    assert [m for m in model.modules() if isinstance(m, TokenLosses)] != []
    assert model.state_dict().keys() == marked.state_dict().keys()


@pytest.mark.slow
def test_trainer_sees_the_same_losses(tmp_path: Path) -> None:
    logs = []
    for backend in ("inductor", None):
        model = lora_fx.compile(llama(2), spec(), backend=backend)
        run = trainer(model, tmp_path / str(backend), max_steps=3, gradient_accumulation_steps=2)
        run.train()
        logs.append([log["loss"] for log in run.state.log_history if "loss" in log])
    assert len(logs[0]) == 3
    assert logs[0] == pytest.approx(logs[1], abs=2e-4)  # Trainer rounds to four places
    assert logs[0][0] != pytest.approx(logs[0][-1], abs=1e-2)


def no_loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return logits.sum() * 0 + 7


def test_a_loss_of_the_user_s_own_is_called() -> None:
    base = llama(2)
    model = lora_fx.compile(base, spec())
    model.loss_function = no_loss  # type: ignore[assignment]
    assert model(input_ids=tokens(), labels=tokens()).loss == 7
    base.loss_function = no_loss  # type: ignore[assignment]
    assert lora_fx.compile(base, spec())(input_ids=tokens(), labels=tokens()).loss == 7


def test_models_with_other_losses_are_left_alone() -> None:
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(llama(2).config)
    given = spec(adapter="rank = 2 alpha = 6")
    model, marked = (lora_fx.compile(base, given, backend=b) for b in ("inductor", None))
    assert not [m for m in model.modules() if isinstance(m, TokenLosses)]
    labels = torch.tensor([1, 0, 1])
    losses = [m(input_ids=tokens(), labels=labels).loss for m in (model, marked)]
    assert torch.allclose(*losses)
    plain = lora_fx.compile(llama(2).model, spec())
    assert not [m for m in plain.modules() if isinstance(m, TokenLosses)]
    eager = lora_fx.compile(llama(2), spec(), backend="eager")
    assert eager.loss_function is ForCausalLMLoss


def test_copies_have_their_own() -> None:
    model = lora_fx.compile(llama(2), spec())
    twin = copy.deepcopy(model)
    assert_equal(step(twin, tokens()), step(model, tokens()), 1e-6)
    twin.eval()
    assert [m.training for m in model.modules() if isinstance(m, TokenLosses)] == [True]


def test_it_is_no_layer() -> None:
    model = lora_fx.compile(llama(2), spec())
    assert lora_fx.capture(model, layer=1, input_ids=tokens()).fqn == "model.layers.1"
    with pytest.raises(lora_fx.LoraFxError, match="has 2 compiled layers"):
        lora_fx.capture(model, layer=2, input_ids=tokens())


def test_it_is_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_program_each(monkeypatch)
    base = build(tmp_path / "out", text("train"))
    model = lora_fx.load(tmp_path / "out", base).train()
    marked = lora_fx.compile(base, text(), backend=None)
    marked.load_state_dict(model.state_dict())
    ids, before = tokens(BATCH, LENGTH), graphs()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for items in (None, torch.tensor(23)):
        got, want = (m(**inputs, num_items_in_batch=items).loss for m in (model, marked))
        assert torch.allclose(got, want, rtol=1e-5)
    assert graphs() == before
    assert "cross_entropy" in (tmp_path / "out/graphs/train/02-captured.txt").read_text()


def test_transformers_loss_has_the_parameters_that_are_passed_on() -> None:
    names = [p.name for p in inspect.signature(ForCausalLMLoss).parameters.values()]
    assert names[:6] == [
        *("logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels")
    ]
