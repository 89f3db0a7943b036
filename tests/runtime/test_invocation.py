"""Adapters that wait for their invocation: generated text, mixed batches, and no new graph."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import StaticCache

import lora_fx
from lora_fx.diagnostics import LoraFxError
from tests.adapters.kinds import Kind, by_peft
from tests.dense import relative
from tests.runtime.invoked import PLACES, SOUGHT, adapted, draw, invoked, samples
from tests.runtime.trainer import base as trained_base
from tests.runtime.trainer import loss, trainer
from tests.tiny import VOCABULARY, graphs, llama, mistral, qwen3, step, tokens

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several-beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
    "no-cache": {"use_cache": False},
    "in parts": {"prefill_chunk_size": 3},
}


def write(model: Any, ids: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    settings = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, **settings | how)


def by_hand(
    model: Any, base: Any, ids: Tensor, starts: tuple[int | None, ...], **how: Any
) -> Tensor:
    """Written by a plain model whose modules add what the adapter adds from each start on."""
    rows = how.get("num_beams", 1)
    every = {i * rows + beam: start for i, start in enumerate(starts) for beam in range(rows)}
    kept = {k: v for k, v in how.items() if k not in ("cache_implementation", "prefill_chunk_size")}
    with adapted(base, model, every):
        return write(base.eval(), ids, **kept | {"use_cache": False})


@pytest.mark.parametrize(
    ("backend", "way"),
    [*((None, way) for way in WAYS), ("eager", "static"), ("inductor", "several-beams")],
)
def test_written_as_by_hand(backend: str | None, way: str) -> None:
    model, ids = invoked(backend=backend), samples()
    got = write(model, ids, **WAYS[way])
    assert torch.equal(got, by_hand(model, llama(2), ids, PLACES, **WAYS[way]))
    assert not torch.equal(got, by_hand(model, llama(2), ids, (None, 15, None), **WAYS[way]))


@pytest.mark.parametrize("build", [mistral, qwen3])
def test_of_other_architectures(build: Any) -> None:
    """One has a window that is shorter than the text."""
    model, ids = invoked(backend="eager", base=build()), samples()
    assert torch.equal(write(model, ids), by_hand(model, build(), ids, PLACES))


@pytest.mark.parametrize("unit", ["layers", "model"])
def test_written_as_by_peft(unit: str) -> None:
    model, ids = invoked("target q_proj, down_proj", "eager", unit), samples()
    config = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config["alora_invocation_tokens"] = list(SOUGHT)
    theirs = by_peft(Kind(lambda: llama(2), "", config), model.get_adapter_state_dict("default"))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    got = write(model, ids, mask)
    assert torch.equal(got, write(theirs, ids, mask))
    with model.disable_adapter():
        assert not torch.equal(got, write(model, ids, mask))


def test_sampled_from_the_adapter_s_distribution() -> None:
    model, ids = invoked(), samples()
    how = {"do_sample": True, "top_k": 0, "output_scores": True, "return_dict_in_generate": True}
    torch.manual_seed(3)
    got = write(model, ids, max_new_tokens=4, num_return_sequences=2, **how)
    whole = got.sequences[:, :-1]
    with adapted(base := llama(2).eval(), model, dict(enumerate(p for p in PLACES for _ in "ab"))):
        want = base(input_ids=whole).logits[:, 16:]
    for i, scores in enumerate(got.scores):
        assert relative(scores, want[:, i]) < 1e-5
    assert relative(got.scores[3], base(input_ids=whole).logits[:, 19]) > 1e-2


def test_what_is_written_does_not_invoke() -> None:
    """Nor does it, where it is there already, begin anew."""
    spec = "lora 1 adapter default { init = random variant = alora(tokens = [N]) target linear }"
    ids, found = tokens(2, 9), 0
    plain = write(llama(2).eval(), ids)
    for token in plain[:, 9:].flatten().tolist():
        if token not in ids:
            model = lora_fx.compile(llama(2), spec.replace("N", str(token)), backend=None).eval()
            draw(model)
            for cached in (True, False):
                assert torch.equal(write(model, ids, use_cache=cached), plain)
            found += 1
    assert found > 3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_a_call_goes_on_where_the_cache_was_left(backend: str | None, cache: str) -> None:
    model, ids = invoked(backend=backend), samples(20)
    ids[0, 14:16] = torch.tensor(SOUGHT)
    held = None
    if cache == "static":
        held = StaticCache(model.config, max_cache_len=32)
    starts: dict[int, int | None] = {0: 8, 1: 18, 2: None}
    got, parts = [], [(0, 12), (12, 13), (13, 14), (14, 18), (18, 20)]
    for first, last in parts:
        result = model(input_ids=ids[:, first:last], past_key_values=held, use_cache=True)
        held = result.past_key_values
        got.append(result.logits)
    with adapted(base := llama(2).eval(), model, starts):
        want = base(input_ids=ids).logits
    assert relative(torch.cat(got, 1), want) < 1e-5
    starts[0] = 14
    with adapted(base, model, starts):
        other = base(input_ids=ids).logits
    assert relative(other[0, :14], want[0, :14]) > 1e-2


@torch.no_grad()
def test_a_cache_that_was_emptied_begins_anew() -> None:
    model, ids = invoked(), samples()
    with model.disable_adapter():
        base = model(input_ids=ids[:, :8]).logits
    cache = StaticCache(model.config, max_cache_len=32)
    model(input_ids=ids, past_key_values=cache)
    cache.reset()
    anew = model(input_ids=ids[:, :8], past_key_values=cache).logits
    assert torch.equal(anew[1:], base[1:])
    assert torch.equal(anew[0, :3], base[0, :3])
    assert not torch.equal(anew[0, 3:], base[0, 3:])
    assert torch.equal(model(input_ids=ids[1:2, :8]).logits, base[1:2])
    cut = model(input_ids=ids, use_cache=True).past_key_values
    cut.crop(7 - 17)
    got = model(input_ids=ids[:, 7:8], past_key_values=cut).logits
    assert relative(got, base[:, 7:8]) < 1e-5
    with pytest.raises(LoraFxError, match="a cache of 3 samples goes on with 2"):
        model(input_ids=ids[:2, :1], past_key_values=cut)


TWO = """lora 1
adapter one { rank = 3 alpha = 5 init = random variant = alora(tokens = [7, 9]) target linear }
adapter two {
  rank = 2 alpha = 5 init = random variant = alora(tokens = [8]) target q_proj, up_proj
}
adapter lora { rank = 4 alpha = 2 init = random target v_proj, down_proj }
route {
  train = true
  when "both" -> 0.5 * one - 0.25 * two + lora
}
"""
NAMES = ["one", "two", "lora", "__base__", "both", "one"]


def two(backend: str | None = None) -> Any:
    model: Any = lora_fx.compile(llama(2), TWO, backend=backend).eval()
    for seed, name in enumerate(("one", "two", "lora")):
        draw(model, name, seed)
    return model


def mixed_samples() -> Tensor:
    ids = samples()
    ids[ids == 8] = VOCABULARY - 2
    ids[0, 6] = ids[1, 11] = ids[2, 12] = 8
    return torch.cat([ids[:2], ids[:2], ids[1:]])


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
@torch.no_grad()
def test_several_active_add_up_each_from_its_own_start(backend: str | None) -> None:
    model, ids = two(backend), mixed_samples()
    base = llama(2).double().eval()
    ones = {0: 8, 1: 15, 2: 8, 3: 15, 4: 15, 5: None}
    twos = {0: 6, 1: 11, 2: 6, 3: 11, 4: 11, 5: 12}
    for order in (["one", "two", "lora"], ["lora", "two", "one"]):
        model.set_adapter(order)
        got = model(input_ids=ids).logits
        scaled = {"one": 1.0, "two": 5 / 2 * 3 / 5, "lora": 2 / 4 * 3 / 5}
        with (
            adapted(base, model, ones, "one"),
            adapted(base, model, twos, "two", scaled["two"]),
            adapted(base, model, dict.fromkeys(range(6), 0), "lora", scaled["lora"]),
        ):
            want = base(input_ids=ids).logits
        assert relative(got, want) < 1e-5
    model.set_adapter("lora")
    assert relative(model(input_ids=ids).logits, want) > 1e-2


@pytest.mark.parametrize(
    "backend", [None, "eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_each_sample_of_a_mixed_batch_is_as_alone(backend: str | None) -> None:
    model, ids = two(backend), mixed_samples()
    got = model(input_ids=ids, adapter_names=NAMES).logits
    written = write(model, ids, adapter_names=NAMES, num_beams=2)
    for i, name in enumerate(NAMES):
        row = ids[i : i + 1]
        if name == "both":
            continue
        model.set_adapter([] if name == "__base__" else name)
        assert relative(got[i], model(input_ids=row).logits[0]) < 1e-5, name
        assert torch.equal(written[i : i + 1], write(model, row, num_beams=2))
    assert relative(got[0], got[3]) > 1e-2
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    bound = 1e-5 if backend == "inductor" else 0
    assert (got[4, :11] - base[4, :11]).abs().max() > 1e-3  # `lora` has a share in it
    assert (got[5] - base[5]).abs().max() <= bound  # not invoked
    assert (got[1, :11] - base[1, :11]).abs().max() <= bound
    assert (got[1, 11:] - base[1, 11:]).abs().max() > 1e-2


@torch.no_grad()
def test_a_mix_takes_each_from_its_own_start() -> None:
    model, ids = two("eager"), mixed_samples()[4:5]
    base = llama(2).double().eval()
    with (
        adapted(base, model, {0: 15}, "one", 0.5),
        adapted(base, model, {0: 11}, "two", -0.25 * 5 / 2 * 3 / 5),
        adapted(base, model, {0: 0}, "lora", 2 / 4 * 3 / 5),
    ):
        want = base(input_ids=ids).logits
    assert relative(model(input_ids=ids, adapter_names=["both"]).logits, want) < 1e-5
    assert relative(model(input_ids=ids, adapter_names=["one"]).logits, want) > 1e-2


def test_a_mixed_batch_trains_each_from_its_own_start() -> None:
    model, ids = two("eager").train(), mixed_samples()
    loss = model(input_ids=ids, adapter_names=NAMES).logits.square().sum((1, 2))
    loss[[0, 5]].sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_adapter("one")
    model(input_ids=ids[[0, 5]]).logits.square().sum().backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(want) == 2 * 2 * 7
    for name, gradient in want.items():
        assert relative(got[name], gradient) < 3e-5, name
    assert all(t.norm() == 0 for name, t in got.items() if name not in want)


@torch.no_grad()
def test_embedded_samples_of_others_run() -> None:
    """What no sample waits for is not looked for."""
    model, ids = two(), mixed_samples()
    embedded = model.get_input_embeddings()(ids)
    names = ["lora", "__base__"] * 3
    want = model(input_ids=ids, adapter_names=names).logits
    assert relative(model(inputs_embeds=embedded, adapter_names=names).logits, want) < 1e-6
    with pytest.raises(LoraFxError, match="`one` acts from its invocation tokens on"):
        model(inputs_embeds=embedded, adapter_names=["one", "lora"] * 3)


@pytest.mark.parametrize("unit", ["layers", pytest.param("model", marks=pytest.mark.slow)])
def test_wherever_it_is_invoked_no_graph_is_made(unit: str) -> None:
    model = lora_fx.compile(
        llama(3), f"{TWO.partition('route')[0]} compile {{ unit = {unit} }}", backend="eager"
    )

    def every_kind(move: int, names: list[list[str]]) -> None:
        for active in names:
            model.set_adapter(active)
            for count, length in ((3, 17), (2, 17), (3, 13), (1, 17), (1, 12)):
                ids = samples(length)[:count].roll(move, 1)
                step(model.train(), ids)
                with torch.no_grad():
                    model.eval()(input_ids=ids)
                write(model, ids, max_new_tokens=3)
                write(model, ids, max_new_tokens=3, num_beams=2)

    every_kind(0, [["one"], ["one", "lora"]])
    before = graphs()
    every_kind(2, [["one"], ["one", "lora"]])
    every_kind(5, [["one"]])
    assert graphs() == before
    if unit == "layers":
        start = "rank = 3 init = random target q_proj variant = alora(tokens ="
        text = f"lora 1 adapter a {{ {start} [7, 9]) }} adapter b {{ {start} [3]) }}"
        model = lora_fx.compile(llama(3), text, backend="eager")
        every_kind(0, [["a"]])
        before = graphs()
        every_kind(1, [["b"], ["a"]])
        assert graphs() == before


def test_trainer(tmp_path: Path) -> None:
    """Its sequences count up: a token in the middle of some of them invokes the adapter."""
    text = """lora 1
    adapter default { rank = 4 variant = alora(tokens = [31, 32]) target linear }"""
    model = lora_fx.compile(trained_base(), text, backend="eager")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(model, tmp_path, max_steps=12)
    first = loss(run)
    run.train()
    assert loss(run) < first - 1e-3
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    again: Any = lora_fx.load(tmp_path / "checkpoint-12", trained_base(), backend=None)
    ids = torch.arange(29, 38)[None]
    assert relative(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits) < 1e-5


class Recomputing(nn.Module):
    """Checkpoints by itself, or does not."""

    def __init__(self, how: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first = nn.Embedding(20, 8), nn.Linear(8, 10)
        self.middle = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 7))
        self.how = how

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.first(self.embed(input_ids))
        return (
            self.middle(x)
            if self.how is None
            else checkpoint(self.middle, x, use_reentrant=self.how)
        )


def own_gradients(how: bool | None, ids: Tensor) -> dict[str, Tensor]:
    text = "lora 1 adapter a { rank = 3 init = random variant = alora(tokens = [7]) target linear }"
    model = lora_fx.compile(Recomputing(how), text, backend=None).train()
    model(input_ids=ids).square().sum().backward()
    assert model.lora_fx_routing.invoked is None
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_model_computes_again_by_itself_is_invoked_as_before(reentrant: bool) -> None:
    ids = torch.tensor([[1, 2, 7, 3, 4], [7, 1, 1, 1, 1], [2, 2, 2, 2, 2]])
    got, want = (own_gradients(how, ids) for how in (reentrant, None))
    assert len(got) == len(want) == 6
    assert all(torch.equal(got[name], want[name]) for name in want)
    other = own_gradients(None, ids.roll(1, 1))
    assert any(relative(other[name], want[name]) > 1e-2 for name in want)
