"""`variant = alora(…)`: acts from its tokens on, as in PEFT; before them the base is the base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import lora_fx
from lora_fx.adapters.peft.keys import live_tensors
from lora_fx.diagnostics import LoraFxError
from lora_fx.graph import ops
from lora_fx.graph.site_references import site
from lora_fx.graph.structure import Branch, Structure
from tests.adapters.kinds import PREFIX, Kind, by_peft, of
from tests.dense import relative
from tests.plan.test_sample_rows import opt, swin
from tests.runtime.invoked import PLACES, SOUGHT, WAITING, adapted, draw, invoked, samples
from tests.runtime.test_combine import loaded_by_peft
from tests.tiny import VOCABULARY, checkpointing, llama, tokens

BACKENDS = [None, "eager", "inductor"]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
KINDS = {
    "linear": ("llama", "target q_proj, down_proj", {}),
    "Conv1D": ("gpt2", "target c_attn, c_fc", {}),
    "lora_bias": ("llama", "lora_bias = true target q_proj, down_proj", {"lora_bias": True}),
    "the head": ("llama", "target q_proj, lm_head", {"target_modules": ["q_proj", "lm_head"]}),
}


def step(model: Any, **inputs: Tensor) -> dict[str, Tensor]:
    """Loss, logits and the gradients of the adapter's tensors, by their names in a file."""
    model.zero_grad()
    ids = inputs.setdefault("input_ids", samples())
    result = model(**inputs, labels=ids)
    result.loss.backward()
    grads = {f"{PREFIX}{n}": t.grad.clone() for n, t in live_tensors(model, "default").items()}
    return {"loss": result.loss.detach(), "logits": result.logits.detach(), **grads}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert tensor.norm() > 0, key
        assert relative(got[key], tensor) < tolerance, key


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_as_peft(kind: str, backend: str | None) -> None:
    architecture, adapter, config = KINDS[kind]
    model = invoked(adapter, backend, base=of(architecture)()).train()
    settings = {"target_modules": TARGETS[architecture], "task_type": "CAUSAL_LM"}
    settings |= {"alora_invocation_tokens": list(SOUGHT), **config}
    state = model.get_adapter_state_dict("default")
    theirs = by_peft(Kind(of(architecture), adapter, settings), state).train()
    for module in (*model.modules(), *theirs.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    result = theirs(input_ids=samples(), labels=samples())
    result.loss.backward()
    grads = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    want = {"loss": result.loss.detach(), "logits": result.logits.detach()}
    want |= {name: grad for name, grad in grads.items() if grad is not None}
    got = step(model)
    assert_same(got, want)
    everywhere = {**got, **step(model, input_ids=samples().flip(1))}
    assert relative(everywhere["logits"], want["logits"]) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_as_dense(backend: str | None) -> None:
    model = invoked(backend=backend)
    base = llama(2).double()
    with adapted(base, model, dict(enumerate(PLACES))):
        result = base(input_ids=samples(), labels=samples())
        grads = torch.autograd.grad(result.loss, list(live_tensors(model, "default").values()))
    keys = [f"{PREFIX}{name}" for name in live_tensors(model, "default")]
    want = {"loss": result.loss, "logits": result.logits, **dict(zip(keys, grads, strict=True))}
    got = step(model.train())
    assert_same(got, want, 3e-5)
    with adapted(base, model, dict(enumerate((3, 15, None)))), torch.no_grad():
        assert relative(base(input_ids=samples()).logits, got["logits"]) > 1e-2


@pytest.mark.parametrize("unit", ["layers", "model"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_rewritten(unit: str, backend: str) -> None:
    assert_same(step(invoked(backend=backend, unit=unit).train()), step(invoked().train()), 3e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_what_is_computed_again_is_invoked_again(backend: str | None, reentrant: bool) -> None:
    """And a call in between, of other samples, changes nothing of that: PEFT refuses it."""
    want, model = step(invoked().train()), invoked(backend=backend).train()
    checkpointing(model, reentrant)
    if reentrant:
        model.enable_input_require_grads()
    ids = samples()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    model(input_ids=ids.flip(1))
    loss.backward()
    for name, tensor in live_tensors(model, "default").items():
        assert relative(tensor.grad, want[f"{PREFIX}{name}"]) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_before_the_invocation_all_is_the_base_s(backend: str | None) -> None:
    """Hidden states, keys and values: a cache of the base serves the adapter."""
    model, ids = invoked(backend=backend), samples()
    got = model(input_ids=ids, output_hidden_states=True, use_cache=True)
    with model.disable_adapter():
        base = model(input_ids=ids, output_hidden_states=True, use_cache=True)
    pairs = list(zip(got.hidden_states, base.hidden_states, strict=True))
    for ours, theirs in zip(got.past_key_values.layers, base.past_key_values.layers, strict=True):
        pairs += [
            (getattr(one, k).transpose(1, 2) for one in (ours, theirs)) for k in ("keys", "values")
        ]
    for one, other in pairs:
        for row, start in enumerate(PLACES):
            if backend == "inductor":  # which computes the rest of another graph in another order
                assert (one[row, :start] - other[row, :start]).abs().max() < 1e-5
            else:
                assert torch.equal(one[row, :start], other[row, :start])
    assert (got.logits[0, 8:] - base.logits[0, 8:]).abs().amax(-1).min() > 1e-2
    assert (got.logits[1, 15:] - base.logits[1, 15:]).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_a_cache_of_the_base_serves_the_adapter(backend: str | None) -> None:
    model, ids = invoked(backend=backend), samples()
    want = model(input_ids=ids[:1]).logits[:, 8:]
    with model.disable_adapter():
        cache = model(input_ids=ids[:1, :8], use_cache=True).past_key_values
    got = model(input_ids=ids[:1, 8:], past_key_values=cache).logits
    assert relative(got, want) < 1e-5
    with model.disable_adapter():
        assert relative(model(input_ids=ids[:1]).logits[:, 8:], want) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_in_other_dtypes(backend: str | None, dtype: torch.dtype) -> None:
    model, want = invoked(backend=backend).to(dtype), invoked()(input_ids=samples()).logits
    got = model(input_ids=samples()).logits
    assert got.dtype is dtype
    assert relative(got.float(), want) < (5e-2 if dtype is torch.bfloat16 else 1e-5)
    with model.disable_adapter():
        base = model(input_ids=samples()).logits
    assert torch.equal(got[2], base[2])
    assert torch.equal(got[0, :8], base[0, :8])
    assert not torch.equal(got[0, 8:], base[0, 8:])


SEEN = {  # of the tokens 7, 7 in what is read, the place where the last of them begin
    "overlapping": ([1, 7, 7, 7, 2], [1, 1, 1, 1, 1], 2),
    "at once": ([7, 7, 1, 2, 3], [1, 1, 1, 1, 1], 0),
    "apart": ([7, 1, 7, 2, 7], [1, 1, 1, 1, 1], None),
    "padding is no invocation": ([7, 7, 1, 2, 7], [0, 0, 1, 1, 1], None),
    "half in padding": ([1, 7, 7, 2, 3], [0, 0, 1, 1, 1], None),
    "padded on the right": ([1, 7, 7, 7, 7], [1, 1, 1, 0, 0], 1),
    "too short": ([7], [1], None),
}


@pytest.mark.parametrize("case", SEEN)
@torch.no_grad()
def test_where_it_is_invoked(case: str) -> None:
    ids, mask, start = SEEN[case]
    text = "lora 1 adapter default { init = random variant = alora(tokens = [7, 7]) target linear }"
    model: Any = lora_fx.compile(llama(2), text, backend=None).eval()
    draw(model)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
    got = model(**inputs).logits[0]
    with model.disable_adapter():
        base = model(**inputs).logits[0]
    changed = (got != base).any(-1).tolist()
    assert changed == [start is not None and place >= start for place in range(len(ids))]


@torch.no_grad()
def test_the_last_logits_alone() -> None:
    """An adapted head sees the last tokens, and counts them from the end."""
    model = invoked("target q_proj, lm_head")
    whole = model(input_ids=samples()).logits
    for count in (1, 4):
        kept = model(input_ids=samples(), logits_to_keep=count).logits
        assert relative(kept, whole[:, -count:]) < 1e-6
    with pytest.raises(LoraFxError, match="which tokens `logits_to_keep` chooses"):
        model(input_ids=samples(), logits_to_keep=torch.tensor([2, 5]))
    assert (
        invoked("target q_proj")(input_ids=samples(), logits_to_keep=torch.tensor([2])) is not None
    )


def structure(bias: bool = False) -> str:
    return str(Structure("linear", (Branch(2, bias=bias, invoked=1),)))


def test_gradients_against_finite_differences() -> None:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    y, x, A, B, b = drawn(3, 4, 5), drawn(3, 4, 6), drawn(2, 6), drawn(5, 2), drawn(5)
    scalings, counts = torch.tensor([0.7]), torch.tensor([[0, 2], [0, -5], [0, 9]])

    def output(y: Tensor, x: Tensor, A: Tensor, B: Tensor, b: Tensor) -> Tensor:
        return site(y, x, [A, B, b], scalings, structure(True), [], None, counts)

    assert torch.autograd.gradcheck(output, (y, x, A, B, b))
    added = output(y, x, A, B, b) - y
    assert (added != 0).any(-1).tolist() == [[False] * 2 + [True] * 2, [False] * 4, [True] * 4]


def test_the_key_of_a_structure() -> None:
    parsed = Structure.parse(structure())
    assert str(parsed) == "linear[r2:p0.0:activation:i1]"
    assert parsed.branches[0].invoked == 1


@torch.no_grad()
def test_folders_both_ways(tmp_path: Path) -> None:
    model, ids = invoked(), samples()
    model.save_pretrained(tmp_path / "ours")
    theirs = loaded_by_peft(tmp_path / "ours", llama(2))
    assert theirs.peft_config["default"].alora_invocation_tokens == list(SOUGHT)
    want = model(input_ids=ids).logits
    assert relative(theirs(input_ids=ids).logits, want) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert one.keys() == other.keys()
    again: Any = lora_fx.load(tmp_path / "theirs", llama(2), backend=None).eval()
    assert torch.equal(again(input_ids=ids).logits, want)
    other_spec = "lora 1 adapter plain { rank = 2 init = random target q_proj }"
    host: Any = lora_fx.compile(llama(2), other_spec, backend="eager").eval()
    host.load_adapter(tmp_path / "theirs", "invoked")
    host.set_adapter("invoked")
    assert relative(host(input_ids=ids).logits, want) < 1e-6
    assert relative(host(input_ids=ids.flip(1)).logits, want) > 1e-2


REFUSED = {
    "init = pissa": "init `pissa` and variant `alora`",
    "target embed_tokens": "an embedding has no variant `alora`",
    'target parameter "model.norm.weight"': "has no variant|cannot be adapted|unsupported",
    "target q_proj { variant = lora }": "variant `alora` at some modules",
    "target q_proj { variant = alora(tokens = [3]) }": "variant `alora` at some modules",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused_in_a_spec(text: str) -> None:
    spec = f"lora 1 adapter default {{ {WAITING} target v_proj {text} }}"
    with pytest.raises(LoraFxError, match=REFUSED[text]):
        lora_fx.compile(llama(2), spec, backend=None)


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (t5, "an encoder and of a decoder"),
        (swin, "takes no `input_ids`"),
        (opt, "rows that are not the tokens of samples"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), "takes no `input_ids`"),
    ],
)
def test_models_without_tokens_of_samples_are_refused(build: Any, said: str) -> None:
    with pytest.raises(LoraFxError, match=said):
        lora_fx.compile(
            build(), f"lora 1 adapter a {{ rank = 1 {WAITING} target linear }}", backend=None
        )


def test_a_part_that_gets_no_tokens_is_refused() -> None:
    spec = f'lora 1 adapter a {{ {WAITING} target "**.vision_tower.**.q_proj" }}'
    with pytest.raises(LoraFxError, match="gets nothing of a sample's tokens"):
        lora_fx.compile(of("llava")(), spec, backend=None)


@torch.no_grad()
def test_calls_that_show_no_tokens_are_refused() -> None:
    model, ids = invoked(), samples()
    embedded = model.get_input_embeddings()(ids)
    with pytest.raises(LoraFxError, match="no `input_ids`"):
        model(inputs_embeds=embedded)
    with pytest.raises(LoraFxError, match="no `input_ids`"):
        model.generate(inputs_embeds=embedded, max_new_tokens=2)
    with pytest.raises(LoraFxError, match="has not looked for it"):
        model.model(input_ids=ids)
    with model.disable_adapter():
        base = model(input_ids=ids).logits
        assert relative(model(inputs_embeds=embedded).logits, base) < 1e-6


def test_it_cannot_be_merged_converted_or_combined(tmp_path: Path) -> None:
    model = invoked()
    before = {name: p.clone() for name, p in model.named_parameters()}
    calls = {
        "acts on some tokens": lambda: model.merge_adapter(),
        "acts on some tokens ": lambda: model.merge_and_unload(),
        "no sum": lambda: model.add_weighted_adapter(["default"], [1.0], "other"),
        "for some tokens": lambda: model.convert_adapter("default", "other", 2),
    }
    for said, call in calls.items():
        with pytest.raises(LoraFxError, match=said.strip()):
            call()
    assert {name for name, _ in model.named_parameters()} == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    for more in ("", "into = base"):
        spec = f'lora 1 adapter a {{ weights = "{tmp_path}" }} merge m {{ from 1.0 * a {more} }}'
        with pytest.raises(LoraFxError, match="which is no sum"):
            lora_fx.compile(llama(2), spec, backend=None)


def test_another_in_its_place_has_to_wait_for_the_same(tmp_path: Path) -> None:
    specs = {
        "same": f"rank = 2 {WAITING} target linear",
        "other": "rank = 3 variant = alora(tokens = [7]) target linear",
        "plain": "rank = 3 target linear",
    }
    for name, adapter in specs.items():
        text = f"lora 1 adapter default {{ init = random {adapter} }}"
        made: Any = lora_fx.compile(llama(2), text, backend=None)
        draw(made, seed=5)
        made.save_pretrained(tmp_path / name)
    model, ids = invoked(backend="eager"), samples()
    before = model(input_ids=ids).logits
    for name in ("other", "plain"):
        with pytest.raises(LoraFxError, match="waits for its invocation"):
            model.hotswap_adapter(tmp_path / name)
        with pytest.raises(LoraFxError, match="waits for other tokens"):
            model.load_adapter(tmp_path / name, "default")
    assert torch.equal(model(input_ids=ids).logits, before)
    model.hotswap_adapter(tmp_path / "same")
    want = lora_fx.load(tmp_path / "same", llama(2), backend=None).eval()(input_ids=ids).logits
    assert relative(model(input_ids=ids).logits, want) < 1e-5
    assert relative(before, want) > 1e-2


def test_status_and_config() -> None:
    model = invoked("target q_proj")
    status = model.get_model_status()
    assert status.active_adapters == ["default"]
    assert status.trainable_params == 2 * (3 * 32 + 32 * 3)
    assert model.peft_config["default"]["alora_invocation_tokens"] == list(SOUGHT)


def test_the_operator_is_registered() -> None:
    counts = torch.tensor([[1, 3]])
    got = ops.invoked(counts, 0, torch.zeros(1, 3, 2))
    assert got.tolist() == [[[0.0], [0.0], [1.0]]]
    assert tokens(1, 3).shape == (1, 3)
