"""`variant = kasa`: beside PEFT and float64, and the base that it leaves a part out of."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import KasaConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.peft.keys import live_tensors
from lora_fx.adapters.weights.changed_weight import original
from tests.adapters.kinds import PREFIX, Kind, by_peft, of, ours, scatter, state_of
from tests.dense import relative
from tests.example_inputs import example_inputs
from tests.runtime.test_combine import loaded_by_peft
from tests.runtime.test_merge import logits
from tests.tiny import graphs, llama, step, tokens

TARGETS = ["q_proj", "down_proj"]
KASA = "variant = kasa(beta = 0.01, gamma = 0.1)"
KIND = Kind(
    of("llama"),
    f"{KASA} target {', '.join(TARGETS)}",
    {"target_modules": TARGETS, "kasa_config": KasaConfig(beta=0.01, gamma=0.1)},
)


def trained(model: Any) -> dict[str, Tensor]:
    model.train().zero_grad()
    result = model(**example_inputs(model))
    result.loss.backward()
    live = live_tensors(model, "default").items()
    grads = {f"{PREFIX}{name}": tensor.grad.clone() for name, tensor in live}
    return {"loss": result.loss.detach(), "logits": result.logits.detach(), **grads}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert tensor.norm() > 0, key
        assert relative(got[key], tensor) < tolerance, key


def test_as_peft_with_the_loss_that_it_is_asked_for() -> None:
    model = ours(KIND)
    theirs: Any = by_peft(KIND, state_of(model)).train()
    loss = theirs(**example_inputs(theirs.get_base_model())).loss
    total = loss + theirs._get_kasa_loss()
    total.backward()
    got = trained(model)
    assert relative(got["loss"], total) < 1e-6
    assert relative(got["loss"], loss) > 1e-2
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    grads = {n.replace(".default", ""): grad for n, grad in grads.items()}
    assert_same({k: t for k, t in got.items() if "lora" in k}, grads)
    with torch.no_grad():
        result = model.eval()(**example_inputs(model))
        want = theirs.eval()(**example_inputs(theirs.get_base_model()))
    assert relative(result.logits, want.logits) < 1e-5
    assert relative(result.loss, want.loss) < 1e-6


@pytest.mark.parametrize("rank", [1, 3])
def test_as_dense_weights_in_float64(rank: int) -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 7).double()
    text = f"lora 1 adapter default {{ rank = {rank} alpha = 5 {KASA} target linear }}"
    model: Any = lora_fx.compile(nn.Sequential(base), text, backend=None)
    scatter(model)
    A, B, d = live_tensors(model, "default").values()
    x, dy = torch.randn(3, 5).double(), torch.randn(3, 7).double()
    (model(x) * dy).sum().backward()
    U, S, V = torch.linalg.svd(base.weight.detach(), full_matrices=False)
    leaves = [t.detach().double().clone().requires_grad_() for t in (A, B, d)]
    W = U[:, :-rank] * S[:-rank] @ V[:-rank] + 5 / rank * leaves[1] @ leaves[2].diag() @ leaves[0]
    y = x @ W.T + base.bias
    (y * dy).sum().backward()
    assert relative(model(x), y) < 1e-6
    assert relative(model(x), base(x)) > 1e-2
    for got, want in zip((A, B, d), leaves, strict=True):
        assert relative(got.grad, want.grad) < 1e-6


def test_gradients_against_finite_differences() -> None:
    text = f"lora 1 adapter default {{ rank = 2 {KASA} target linear }}"
    model: Any = lora_fx.compile(nn.Sequential(nn.Linear(5, 7)), text, backend=None).double()
    scatter(model)
    x = torch.randn(3, 5).double()
    values = [t for t in live_tensors(model, "default").values()]

    def loss() -> Tensor:
        return model(x).square().sum() + model.auxiliary_loss()

    loss().backward()
    for tensor in values:
        place = (0,) * tensor.dim()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor[place] += sign * 1e-5
                ends.append(loss().item())
                tensor[place] -= sign * 1e-5
        assert abs((ends[0] - ends[1]) / 2e-5 - tensor.grad[place].item()) < 1e-6


@pytest.mark.parametrize(
    ("backend", "unit"), [("eager", "layers"), ("eager", "model"), ("inductor", "layers")]
)
def test_rewritten(backend: str, unit: str) -> None:
    assert_same(trained(ours(KIND, backend, unit)), trained(ours(KIND)))


def test_without_the_adapter_it_is_the_base_and_the_given_model_is_as_it_was() -> None:
    base = llama(2)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    text = f"lora 1 adapter default {{ rank = 3 {KASA} target q_proj, up_proj }}"
    model: Any = lora_fx.compile(base, text, backend=None).eval()
    assert all(torch.equal(before[name], t) for name, t in base.state_dict().items())
    start = logits(model)
    assert relative(start, logits(base.eval())) > 1e-4  # a part of the weight is left out
    with model.disable_adapter():
        assert relative(logits(model), logits(base)) < 1e-5
    for _, site in storage.sites(model):
        A0, B0 = (f.weight for f in (site.lora_change.factors.A, site.lora_change.factors.B))
        assert relative(original(site), site.weight + B0 @ A0) < 1e-6
        assert torch.linalg.svdvals(site.weight)[-3:].max() < 1e-5
    model.delete_adapter("default")
    assert relative(logits(model), logits(base)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_by_us_and_by_peft(dtype: torch.dtype, tmp_path: Path) -> None:
    text = f"lora 1 adapter default {{ rank = 3 alpha = 5 {KASA} target q_proj, up_proj }}"
    model: Any = lora_fx.compile(llama(2).to(dtype), text, backend=None).eval()
    scatter(model)
    want, near = logits(model), 1e-5 if dtype is torch.float32 else 3e-2
    model.save_pretrained(tmp_path / "ours")
    base = llama(2).to(dtype)
    loaded: Any = lora_fx.load(tmp_path / "ours", base, backend=None).eval()
    assert relative(logits(loaded), want) < 1e-6
    loaded.load_adapter(tmp_path / "ours")  # over itself: the weight is truncated once
    assert relative(logits(loaded), want) < 1e-6
    theirs: Any = loaded_by_peft(tmp_path / "ours", llama(2).to(dtype))
    assert theirs.peft_config["default"].kasa_config.gamma == 0.1
    with torch.no_grad():
        assert relative(theirs(tokens()).logits, model(tokens()).logits) < near
    theirs.save_pretrained(tmp_path / "theirs")
    again: Any = lora_fx.load(tmp_path / "theirs", llama(2).to(dtype), backend=None).eval()
    assert relative(logits(again), want) < 1e-6
    assert relative(logits(base.eval()), want) > 1e-2
    with torch.enable_grad():
        assert relative(again.auxiliary_loss(), theirs._get_kasa_loss()) < 1e-6


def test_merged_and_unmerged() -> None:
    model = ours(KIND, "eager").eval()
    want = logits(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    assert relative(logits(model), want) < 1e-5
    model.unmerge_adapter()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    plain = model.merge_and_unload()
    assert relative(logits(plain), want) < 1e-5
    assert relative(logits(KIND.base().eval()), want) > 1e-2


def test_an_artifact_copies_and_checkpoints_hold_it(tmp_path: Path) -> None:
    spec = f"lora 1 adapter default {{ rank = 3 {KASA} target q_proj }}"
    base = llama(2)
    lora_fx.build(spec, base, tmp_path / "artifact")
    model: Any = lora_fx.load(tmp_path / "artifact", base, backend=None).eval()
    scatter(model)
    want = logits(model)
    assert relative(logits(copy.deepcopy(model)), want) < 1e-6
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert relative(logits(torch.load(buffer, weights_only=False)), want) < 1e-6
    twin: Any = lora_fx.compile(base, spec, backend=None).eval()
    model.save_pretrained(tmp_path / "checkpoint-3")
    assert relative(logits(twin), want) > 1e-3
    saved = tmp_path / "checkpoint-3" / "model.safetensors"
    result = twin.load_state_dict(load_file(saved), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert relative(logits(twin), want) < 1e-6
    assert relative(logits(model.double()), want) < 1e-5


def test_the_parts_of_a_batch_add_up_to_one_regularisation(tmp_path: Path) -> None:
    """`Trainer` divides each part's loss by the labels of all parts."""
    totals = {}
    for parts in (1, 2):
        model = ours(KIND)
        settings = TrainingArguments(
            **{"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, "report_to": []},
            **{"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts},
            **{"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no"},
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens(4, 11)]
        Trainer(model, settings, train_dataset=rows).train()
        totals[parts] = {n: t.detach().clone() for n, t in live_tensors(model, "default").items()}
    start = {n: t.detach() for n, t in live_tensors(ours(KIND), "default").items()}
    for name, tensor in totals[1].items():
        assert relative(totals[2][name] - start[name], tensor - start[name]) < 1e-4, name
    alone = ours(KIND)
    alone.auxiliary_loss().backward()
    d = next(t for n, t in live_tensors(alone, "default").items() if "diag" in n)
    assert d.grad.norm() > 0


def classifier() -> tuple[nn.Module, Tensor]:
    config = LlamaConfig(**{**llama(1).config.to_dict(), "pad_token_id": 0, "num_labels": 3})
    return LlamaForSequenceClassification(config), torch.tensor([0, 2, 1])


def encoder_decoder() -> tuple[nn.Module, Tensor]:
    settings = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=128, decoder_start_token_id=0, dropout_rate=0.0, **settings)
    return T5ForConditionalGeneration(config), tokens(3, 5)


@pytest.mark.parametrize("make", [classifier, encoder_decoder])
@pytest.mark.parametrize("samples", [1, 3])
def test_no_label_is_left_out_where_none_is_shifted(make: Any, samples: int) -> None:
    base, labels = make()
    labels = labels[:samples]
    target = "q_proj" if make is classifier else "q"
    text = f"lora 1 adapter default {{ rank = 2 {KASA} target {target} }}"
    model: Any = lora_fx.compile(base, text, backend=None)
    inputs = {"input_ids": tokens(3, 7)[:samples], "labels": labels}
    items = torch.tensor(labels.numel())
    got = model.train()(**inputs, num_items_in_batch=items).loss
    without = model.eval()(**inputs, num_items_in_batch=items).loss
    assert model.auxiliary_loss() > 1e-2
    assert relative(got - without, model.auxiliary_loss()) < 1e-4
    half = model.train()(**inputs, num_items_in_batch=2 * items).loss
    without = model.eval()(**inputs, num_items_in_batch=2 * items).loss
    assert relative(half - without, model.auxiliary_loss() / 2) < 1e-4


def test_plan_counts_what_is_held() -> None:
    text = f"lora 1 adapter default {{ rank = 3 {KASA} target q_proj, up_proj }}"
    base = llama(2)
    plan = lora_fx.plan(text, base)
    assert plan.adapters[0].sites[0].tensors["lora_diag"] == (3,)
    model: Any = lora_fx.compile(base, text, backend=None)
    shared = {p.data_ptr() for p in base.parameters()}
    own = {p.data_ptr(): p.nbytes for p in model.parameters() if p.data_ptr() not in shared}
    assert plan.memory()["adapters"] == sum(own.values())
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(site.trained for site in plan.adapters[0].sites) == sum(trained)


def test_nothing_is_compiled_again_when_the_adapter_is_switched() -> None:
    text = f"""lora 1 adapter one {{ rank = 3 {KASA} target q_proj }}
    adapter two {{ rank = 2 init = random target q_proj }}"""
    model: Any = lora_fx.compile(llama(2), text, backend="eager")
    for name in ("one", "two"):
        scatter(model, name)
    for active in (["one"], ["two"]):
        model.set_adapter(active)
        step(model.train(), tokens(2, 11))
        logits(model.eval())
    made = graphs()
    found = {}
    for active in ("one", "two", "one"):
        model.set_adapter(active)
        step(model.train(), tokens(2, 11))
        found[active] = logits(model.eval())
    assert graphs() == made
    assert relative(found["one"], found["two"]) > 1e-3
    alone: Any = lora_fx.compile(llama(2), text[:7] + text[text.index("adapter two") :]).eval()
    scatter(alone, "two")
    assert relative(found["two"], logits(alone)) < 1e-5


REFUSED = {
    "needs a rank below": "rank = 32 variant = kasa target q_proj",
    "`lora_bias` and variant `kasa`": "lora_bias = true variant = kasa target q_proj",
    "init `pissa` and variant `kasa`": "init = pissa variant = kasa target q_proj",
    "has no variant `kasa`": "variant = kasa target embed_tokens",
    "at some modules of an adapter": (
        "variant = kasa target q_proj target v_proj { variant = lora }"
    ),
    "and only one adapter can": (
        "variant = kasa target q_proj } adapter other { variant = kasa target q_proj"
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str) -> None:
    with pytest.raises(lora_fx.LoraFxError, match=message):
        lora_fx.compile(llama(2), f"lora 1 adapter default {{ {REFUSED[message]} }}", backend=None)


def test_a_conv1d_is_refused_as_by_peft() -> None:
    text = "lora 1 adapter default { variant = kasa target c_attn }"
    with pytest.raises(lora_fx.LoraFxError, match="has no variant `kasa`"):
        lora_fx.compile(of("gpt2")(), text, backend=None)
    with pytest.raises(ValueError, match="KaSA"):
        by_peft(Kind(of("gpt2"), "", {"target_modules": ["c_attn"], "kasa_config": {}}), {})
