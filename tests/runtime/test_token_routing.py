"""`route { by = arrow(…) }`: as PEFT's `create_arrow_model`, and as one dense token at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import lora_fx
from lora_fx.adapters import storage
from lora_fx.diagnostics import LoraFxError
from tests.dense import relative
from tests.runtime.routed_tokens import (
    GENERAL,
    TARGETS,
    TASKS,
    TEMPERATURE,
    TOP,
    by_peft,
    routed,
    spec,
    write,
    write_all,
)
from tests.tiny import checkpointing, generate, graphs, llama, tokens, uncached

BACKENDS = [None, "eager", "inductor"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("adapters"))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    return model(input_ids=tokens() if ids is None else ids).logits


def step(model: Any) -> dict[str, Tensor]:
    """Loss, logits and the gradient of what goes into the first layer."""
    ids = tokens()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    result = model(inputs_embeds=embedded, labels=ids)
    result.loss.backward()
    assert embedded.grad is not None
    return {"loss": result.loss.detach(), "logits": result.logits, "dx": embedded.grad}


@contextmanager
def dense(
    base: nn.Module, model: Any, general: tuple[str, ...] = (), top: int = TOP
) -> Iterator[None]:
    """Let a float64 base add to each token, one by one, what the adapters do to it."""
    made = []
    for fqn, site in storage.sites(model):
        module = base.get_submodule(fqn)
        made.append(module.register_forward_hook(by_token(site, general, top)))
    yield
    for hook in made:
        hook.remove()


def by_token(site: Any, general: tuple[str, ...], top: int) -> Any:
    def factors(name: str) -> tuple[Tensor, Tensor]:
        own = site.lora_branches[name]
        return own.A.weight.double(), own.B.weight.double()

    means = [0.0, 0.0]
    if general:
        both = zip(*map(factors, general), strict=True)
        means = [torch.stack(one).mean(0) for one in both]  # type: ignore[misc]
    names = site.lora_active
    changes = {n: (factors(n)[1] - means[1]) @ (factors(n)[0] - means[0]) for n in names}
    directions = {name: torch.linalg.svd(change).Vh[0] for name, change in changes.items()}

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        rows = []
        for x in args[0].double().flatten(0, -2):
            z = {name: (x @ v).abs() for name, v in directions.items()}
            best = sorted(z, key=lambda name: -float(z[name].detach()))[:top]
            powers = {name: (z[name] / TEMPERATURE).exp() for name in best}
            scales = {name: site.lora_arithmetic[name].scaling for name in best}
            parts = [powers[n] / sum(powers.values()) * scales[n] * changes[n] @ x for n in best]
            rows.append(sum(parts[1:], parts[0]))
        return y + torch.stack(rows).view_as(y).to(y.dtype)

    return hook


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_peft(folder: Path, backend: str | None, general: bool) -> None:
    want = logits(by_peft(folder, general).eval())
    model = routed(folder, backend, general)
    assert relative(logits(model), want) < 1e-5
    assert relative(logits(by_peft(folder, not general).eval()), want) > 1e-2
    assert relative(logits(routed(folder, backend, general, top=1)), want) > 1e-2
    assert relative(logits(routed(folder, backend, general, temperature=2.0)), want) > 1e-3
    with model.disable_adapter():
        assert relative(logits(model), logits(llama(2).eval())) < 1e-5
    assert relative(logits(model), want) < 1e-5


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_as_peft_which_trains_nothing_of_it_either(
    folder: Path, backend: str | None, general: bool
) -> None:
    theirs = by_peft(folder, general).train()
    want = step(theirs)
    learned = {n for n, p in theirs.named_parameters() if p.grad is not None}
    assert not learned
    model = routed(folder, backend, general).train()
    assert not any(p.requires_grad for p in model.parameters())
    got = step(model)
    for key, tensor in want.items():
        assert tensor.norm() > 0
        assert relative(got[key], tensor) < 1e-5, key
    with model.disable_adapter():
        assert relative(step(model)["dx"], want["dx"]) > 1e-2


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_step_as_dense(
    folder: Path, backend: str | None, dtype: torch.dtype, general: bool
) -> None:
    model = routed(folder, backend, general).to(dtype)
    base = llama(2).to(dtype).double()
    with dense(base, model, GENERAL if general else ()):
        want = step(base)
    for key, tensor in step(model.train()).items():
        # of a rotary cache in float32
        assert relative(tensor, want[key]) < (2e-5 if dtype is torch.float32 else 1e-6), key
    with dense(base, model, GENERAL if general else (), top=3):
        assert relative(step(base)["logits"], want["logits"]) > 1e-2


@pytest.mark.parametrize("unit", ["layers", "model"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_units(folder: Path, unit: str, backend: str) -> None:
    more = f"compile {{ unit = {unit} }}"
    want = step(routed(folder, general=True).train())
    got = step(routed(folder, backend, True, more=more).train())
    for key, tensor in want.items():
        assert relative(got[key], tensor) < 1e-5, key


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_is_routed_again(folder: Path, reentrant: bool) -> None:
    want, model = step(routed(folder).train()), routed(folder, "eager").train()
    checkpointing(model, reentrant)
    assert relative(step(model)["dx"], want["dx"]) < 1e-5


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_as_peft(folder: Path, backend: str | None, general: bool) -> None:
    ids = tokens(2, 7)
    theirs: Any = by_peft(folder, general).eval()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    want = theirs.generate(input_ids=ids, min_new_tokens=12, pad_token_id=0, **settings)
    model = routed(folder, backend, general)
    assert torch.equal(generate(model, ids), want)
    with model.disable_adapter():
        assert not torch.equal(generate(model, ids), want)


def test_conv1d_layers(tmp_path: Path) -> None:
    """And adapters of different ranks, which PEFT refuses."""
    base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=101)).eval()
    text = """lora 1
    adapter sql   { rank = 3 init = random trainable = false target c_attn, c_fc }
    adapter style { rank = 5 init = random trainable = false target c_attn, c_fc }
    adapter law   { rank = 2 init = random trainable = false target c_attn, c_fc }
    route { by = arrow(top = 2, temperature = 0.5) }"""
    model = lora_fx.compile(base, text, backend=None)
    double = base.double()
    with dense(double, model), torch.no_grad():
        want = double(tokens()).logits
    got = lora_fx.compile(base.float(), text, backend="eager").eval()
    assert relative(logits(got), want) < 1e-5
    assert relative(logits(base), want) > 1e-2


def test_in_a_graph_one_comparison_serves_all_adapters_of_a_layer(folder: Path) -> None:
    graph = lora_fx.capture(routed(folder, "eager", True), layer=1, input_ids=tokens())
    lines = [line for line in graph.text("adapted").splitlines() if "lora_fx" in line]
    for target in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        (compared,) = (line for line in lines if f"{target}.lora_experts.prototypes" in line)
        assert "lora_fx.arrow(" in compared
        assert ", 2, 0.5)" in compared
        assert "sql, style, law" in compared
        expands = [n for n in lines if "lora_fx.expand(" in n and f"{target}.lora_scalings" in n]
        assert len(expands) == 3
        assert all("narrow" in line for line in expands)
    lowered = graph.text("lowered")
    assert lowered.count("topk(") == 3
    assert lowered.count("lora_fx.") == 0


@pytest.mark.parametrize("layout", ["plain", "augmented"])
def test_layouts(folder: Path, layout: str) -> None:
    want = step(routed(folder, None, True).train())
    more = f"compile {{ layout = {layout} }}"
    got = step(routed(folder, "inductor", True, more=more).train())
    for key, tensor in want.items():
        assert relative(got[key], tensor) < 1e-5, key


@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_a_base_in_four_bits(folder: Path, backend: str | None) -> None:
    quantize = "quantize linear { method = nf4 }"
    model = routed(folder, backend, True, more=quantize)
    base = lora_fx.compile(llama(2), f"lora 1 {quantize}", backend=None).eval()
    plain = logits(base)
    with dense(base, model, GENERAL):
        want = logits(base)
    assert relative(logits(model), want) < 1e-5
    assert relative(plain, want) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(folder: Path, backend: str | None) -> None:
    """All adapters, so that rounding chooses no other ones."""
    want = logits(routed(folder, None, True, top=3))
    model = routed(folder, backend, True, top=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(logits(model), want) < 2e-2
    model = routed(folder, backend, True, top=3).bfloat16()
    assert all(
        site.lora_experts.prototypes.dtype is torch.float32 for _, site in storage.sites(model)
    )
    got = logits(model)
    assert got.dtype is torch.bfloat16
    assert relative(got, want) < 3e-2
    assert relative(logits(routed(folder, None, top=3)), want) > 1e-1


def test_an_exchanged_adapter_makes_no_graph(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path, "style", 11)
    small = write(tmp_path, "small", 12, rank=2)
    with uncached():
        model = routed(folder, "eager")
        before, made = logits(model), graphs()
        assert made > 0
        model.load_adapter(other, "style")
        swapped = logits(model)
        model.set_adapter(["law", "style", "sql"])
        assert relative(logits(model), swapped) < 1e-5
        model.hotswap_adapter(small, "law")
        last = logits(model)
        assert graphs() == made
    assert relative(swapped, before) > 1e-2
    texts = spec(folder).replace(str(folder / "style"), str(other))
    assert relative(logits(lora_fx.compile(llama(2), texts).eval()), swapped) < 1e-5
    texts = texts.replace(str(folder / "law"), str(small))
    assert relative(logits(lora_fx.compile(llama(2), texts).eval()), last) < 1e-5


@pytest.mark.parametrize("general", [False, True])
def test_prototypes_are_made_when_values_change_and_not_otherwise(
    folder: Path, general: bool
) -> None:
    model = routed(folder, None, general)
    (_, site), *_ = storage.sites(model)
    held = site.lora_experts
    with model.disable_adapter():
        pass
    model._activate()
    assert site.lora_experts is held
    state = {k: 2 * t if "lora_A.style" in k else t for k, t in model.state_dict().items()}
    state |= {k: t.flip(1) for k, t in state.items() if "lora_A.law" in k}
    before = logits(model)
    model.load_state_dict(state)
    assert site.lora_experts is not held
    after = logits(model)
    assert relative(after, before) > 1e-2
    base = llama(2).double()
    with dense(base, model, GENERAL if general else ()), torch.no_grad():
        assert relative(after, base(tokens()).logits) < 1e-5


def test_more_and_fewer_adapters(folder: Path, tmp_path: Path) -> None:
    """One alone is all of it; a loaded one is routed to once it is active."""
    model = routed(folder, general=False)
    plain = lora_fx.compile(llama(2), f'lora 1 adapter sql {{ weights = "{folder / "sql"}" }}')
    model.set_adapter("sql")
    assert relative(logits(model), logits(plain.eval())) < 1e-5
    model.load_adapter(write(tmp_path, "new", 21), "new")
    assert relative(logits(model), logits(plain)) < 1e-5
    model.set_adapter(["sql", "new", "law"])
    text = spec(folder).replace(str(folder / "style"), str(tmp_path / "new"))
    want = logits(lora_fx.compile(llama(2), text, backend=None).eval())
    assert relative(logits(model), want) < 1e-5
    model.delete_adapter("law")
    model.delete_adapter("new")
    assert model.active_adapters() == ["sql"]
    model.delete_adapter("sql")
    assert model.active_adapters() == ["style"]


def test_scalings_may_be_multiplied(folder: Path) -> None:
    model = routed(folder)
    before = logits(model)
    with model.rescale_adapter_scale(0.0):
        assert relative(logits(model), logits(llama(2).eval())) < 1e-6
    assert torch.equal(logits(model), before)


def test_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    """The files are the adapters as they were, for PEFT too: nothing is subtracted there."""
    model = routed(folder, None, True)
    want = logits(model)
    model.save_pretrained(tmp_path / "saved")
    for name in (*TASKS, *GENERAL):
        ours = load_file(tmp_path / "saved" / name / "adapter_model.safetensors")
        theirs = load_file(folder / name / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    again = lora_fx.load(tmp_path / "saved", llama(2), backend=None).eval()
    assert sorted(again.active_adapters()) == sorted(TASKS)
    assert relative(logits(again), want) < 1e-6
    assert relative(logits(by_peft(tmp_path / "saved", True).eval()), want) < 1e-5


def test_an_artifact(folder: Path, tmp_path: Path) -> None:
    more = "compile { entry forward { batch = 3  sequence = 17 } }"
    lora_fx.build(spec(folder, True, more=more), llama(2), tmp_path / "artifact")
    model = lora_fx.load(tmp_path / "artifact", llama(2), trust_cache=True).eval()
    assert relative(logits(model), logits(routed(folder, None, True))) < 1e-5


def test_merged_adapters_may_be_among_them(folder: Path) -> None:
    """General knowledge may be one merge of several."""
    adapters = (*TASKS, *GENERAL)
    names = "\n".join(f'adapter {n} {{ weights = "{folder / n}" }}' for n in adapters)
    text = f"""lora 1
    {names}
    merge known {{ from 0.5 * english + 0.5 * french  method = svd  rank = svd(3) }}
    route {{ by = arrow(top = 2, temperature = 0.5, general = ["known"]) }}"""
    model = lora_fx.compile(llama(2), text, backend=None).eval()
    assert model.active_adapters() == [*adapters]
    base = llama(2).double()
    with dense(base, model, ("known",)), torch.no_grad():
        want = base(tokens()).logits
    assert relative(logits(model), want) < 1e-5
    with dense(base, model), torch.no_grad():
        assert relative(base(tokens()).logits, want) > 1e-2


def refused(call: Any, *parts: str) -> None:
    with pytest.raises(LoraFxError) as raised:
        call()
    said = "\n".join(f"[{d.code}] {d.message} {d.help}" for d in raised.value.diagnostics)
    for part in parts:
        assert part in said


def test_calls_that_are_refused_change_nothing(folder: Path, tmp_path: Path) -> None:
    model = routed(folder, "eager", True)
    before = logits(model)
    ids = tokens()
    refused(lambda: model(ids, adapter_names=["sql"] * 3), "[bad-routing]", "each token")
    refused(lambda: model(ids, adapter_indices=torch.zeros(3, dtype=torch.int32)), "[bad-routing]")
    refused(lambda: generate(model, ids, adapter_names=["sql"] * 3), "[bad-routing]")
    for name in ("merge_adapter", "merge_and_unload"):
        refused(getattr(model, name), "[cannot-merge]", "each token is routed by itself")
    refused(lambda: model.set_adapter(["sql", "english"]), "`english` is general knowledge")
    refused(lambda: model.delete_adapter("english"), "there is no adapter `english`")
    cases = {
        "dora": ({"use_dora": True}, "`dora` at `model.layers.*.self_attn.q_proj` is `dora`"),
        "rank": ({"rank": 2}, "have ranks 3 and 2"),
        "narrow": ({"target_modules": TARGETS[:2]}, "adapts `model.layers.*.mlp.down_proj`"),
        "bias": ({"lora_bias": True}, "a bias on B"),
        "copy": ({"modules_to_save": ["lm_head"]}, "trains `lm_head` as a whole"),
        "all": ({"bias": "all"}, ""),
        "embedding": ({"target_modules": [*TARGETS, "embed_tokens"]}, "adapts an embedding"),
    }
    for name, (settings, said) in cases.items():
        model.load_adapter(write(tmp_path, name, 31, **settings), name)
        if name != "all":  # llama has no biases
            refused(lambda name=name: model.set_adapter(["sql", name]), "[not-routable]", said)
    model.load_adapter(folder / "law", "learns", is_trainable=True)
    refused(lambda: model.set_adapter(["sql", "learns"]), "[not-routable]", "`learns` learns")
    assert model.active_adapters() == list(TASKS)
    assert torch.equal(logits(model), before)


def test_unloaded_it_is_the_base(folder: Path) -> None:
    plain = routed(folder, None, True).unload()
    assert not any("lora" in name for name, _ in plain.named_modules())
    assert torch.equal(logits(plain), logits(llama(2).eval()))
