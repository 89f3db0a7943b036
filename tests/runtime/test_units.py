"""The capture design where it could break: 30 layers, every mode, graphs counted by Dynamo."""

import inspect

import pytest
import torch
from torch import nn

import lora_fx
from tests.tiny import (
    assert_differ,
    assert_equal,
    checkpointing,
    generate,
    gpt_neox,
    graphs,
    llama,
    mistral,
    qwen3,
    spec,
    step,
    tokens,
)

DEPTH = {"layers": 30, "model": 12}


def pair(unit: str, base: nn.Module | None = None, more: str = "") -> tuple[nn.Module, nn.Module]:
    """The rewritten model and the marked one it must equal."""
    base = base if base is not None else llama(DEPTH[unit])
    text = spec(unit, more=more)
    return lora_fx.compile(base, text, backend="eager"), lora_fx.compile(base, text, backend=None)


def added_graphs(run) -> int:
    before = graphs()
    run()
    return graphs() - before


@pytest.mark.parametrize(("unit", "count"), [("layers", 2), ("model", 1)])
def test_training(unit: str, count: int) -> None:
    model, marked = pair(unit)
    ids = tokens()
    assert added_graphs(lambda: assert_equal(step(model, ids), step(marked, ids))) == count
    on = marked(ids).logits
    with marked.disable_adapter():
        assert_differ([marked(ids).logits], [on])


def test_training_takes_two_graphs_at_any_depth() -> None:
    for depth in (3, 14):
        model, _ = pair("layers", llama(depth))
        assert added_graphs(lambda model=model: step(model, tokens())) == 2


@pytest.mark.parametrize(("unit", "count"), [("layers", 4), ("model", 2)])
def test_a_smaller_last_batch_and_gradient_accumulation(unit: str, count: int) -> None:
    model, marked = pair(unit)

    def accumulate(m: nn.Module) -> dict[str, torch.Tensor]:
        m.zero_grad()
        for ids in map(tokens, (3, 3, 2, 3, 2)):
            m(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

    want = accumulate(marked)
    assert added_graphs(lambda: assert_equal(accumulate(model), want)) == count
    assert added_graphs(lambda: step(model, tokens(4))) == 0


@pytest.mark.parametrize("unit", ["layers", "model"])
def test_evaluation(unit: str) -> None:
    model, marked = pair(unit)
    model.eval(), marked.eval()
    with torch.no_grad():
        got, want = model(tokens()).logits, marked(tokens()).logits
        assert_equal({"a": got, "b": got}, {"a": want, "b": want})
        with model.disable_adapter():
            assert_differ([model(tokens()).logits], [want])


@pytest.mark.parametrize("unit", ["layers", "model"])
@pytest.mark.parametrize(("cache", "count"), [(None, 3), ("static", 2)])
def test_generation(unit: str, cache: str | None, count: int) -> None:
    model, marked = pair(unit)
    model.eval(), marked.eval()
    settings = {"cache_implementation": cache} if cache else {}
    got = []
    assert added_graphs(lambda: got.append(generate(model, tokens(), **settings))) <= count
    assert torch.equal(got[0], generate(marked, tokens(), **settings))
    with marked.disable_adapter():
        assert not torch.equal(got[0], generate(marked, tokens(), **settings))
    assert added_graphs(lambda: generate(model, tokens(), **settings)) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_layers(reentrant: bool) -> None:
    model, marked = pair("layers")
    for m in (model, marked):
        checkpointing(m, reentrant)
    for ids in (tokens(3), tokens(2), tokens(3), tokens(2, 11)):
        assert_equal(step(model, ids), step(marked, ids))
    for m in (model, marked):
        m._set_gradient_checkpointing(False)
    assert_equal(step(model, tokens()), step(marked, tokens()))


def test_checkpointing_inside_the_whole_model() -> None:
    model, marked = pair("model", llama(12))
    for m in (model, marked):
        checkpointing(m, reentrant=False)
    assert added_graphs(lambda: assert_equal(step(model, tokens()), step(marked, tokens()))) == 1


def test_a_whole_model_is_never_reentrant() -> None:
    model, marked = pair("model", llama(2))
    with pytest.warns(UserWarning, match="never re-entrant"):
        checkpointing(model, reentrant=True)
    checkpointing(marked, reentrant=False)
    assert_equal(step(model, tokens()), step(marked, tokens()))


@pytest.mark.parametrize("unit", ["layers", "model"])
def test_checkpoint_in_the_file(unit: str) -> None:
    text = spec(unit).replace("unit", "checkpoint = layers  unit")
    model = lora_fx.compile(llama(12), text, backend="eager")
    assert model.lora_fx_recomputes
    _, marked = pair(unit, llama(12))
    assert_equal(step(model, tokens()), step(marked, tokens()))
    with pytest.warns(UserWarning, match="in force already"):
        checkpointing(model, reentrant=True)


@pytest.mark.slow
def test_many_architectures_in_one_process() -> None:
    """More graphs than Dynamo's usual eight per code object, none of them lost to the limit."""
    for build in (llama, qwen3, mistral, gpt_neox):
        model, marked = pair("layers", build(3))
        for ids in (tokens(3), tokens(2), tokens(2, 9)):
            assert_equal(step(model, ids), step(marked, ids))
        model.eval(), marked.eval()
        assert torch.equal(generate(model, tokens()), generate(marked, tokens()))
        assert torch.equal(
            generate(model, tokens(), cache_implementation="static"),
            generate(marked, tokens(), cache_implementation="static"),
        )


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters,
    reason="torch 2.11 has only the limit of the process",
)
def test_beyond_the_limit_it_fails_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_fx.runtime.units.unit.GRAPHS_PER_UNIT", 1)
    model, _ = pair("layers", llama(2))
    with pytest.raises(lora_fx.LoraFxError, match="needs more than 1 graphs"):
        step(model, tokens())


@pytest.mark.parametrize("unit", ["layers", "model"])
def test_an_outer_compile_is_named(unit: str) -> None:
    model, marked = pair(unit, llama(12))
    outer = torch.compile(model)
    with pytest.warns(UserWarning, match="leave out the torch.compile"):
        loss = outer(input_ids=tokens(), labels=tokens()).loss
    assert torch.allclose(loss, marked(input_ids=tokens(), labels=tokens()).loss)


def test_dynamic_from_the_first_call() -> None:
    text = spec().replace("unit", "dynamic = true  unit")
    model = lora_fx.compile(llama(3), text, backend="eager")
    step(model, tokens(3))
    assert added_graphs(lambda: (step(model, tokens(2)), step(model, tokens(5, 9)))) == 0


def test_switching_and_toggling_make_no_graphs_once_each_ran() -> None:
    text = """lora 1
    adapter sql { rank = 3 init = random target linear }
    adapter style { rank = 3 init = random alpha = 5 target linear }"""
    base = llama(4)
    model, marked = (lora_fx.compile(base, text, backend=b) for b in ("eager", None))
    step(model, tokens())

    def switch() -> None:
        for name in ("style", "sql"):
            model.set_adapter(name), marked.set_adapter(name)
            assert_equal(step(model, tokens()), step(marked, tokens()))

    def toggle() -> None:
        with model.disable_adapter():
            assert torch.equal(model(tokens()).logits, base(tokens()).logits)

    assert added_graphs(switch) == 0
    assert added_graphs(toggle) == 1
    assert added_graphs(lambda: (switch(), toggle())) == 0
