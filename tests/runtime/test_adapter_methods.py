"""Adapters by name: what each method changes, and that it changes nothing else."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from tests.adapters.peft.both import compiled, logits, peft_model
from tests.adapters.peft.state import assert_same, snapshot
from tests.dense import relative
from tests.tiny import assert_differ, llama

ONE = "adapter one { rank = 3 alpha = 5 init = random target linear }"
TWO = "adapter two { rank = 2 init = random seed = 4 target q_proj, down_proj }"
FROZEN = "adapter three { rank = 2 init = random trainable = false target o_proj }"
ALL = f"{ONE} {TWO} {FROZEN}"


def flags_and_modes(model: nn.Module) -> dict:
    flags = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    return flags | {n: m.training for n, m in model.named_modules()}


@pytest.fixture
def model() -> nn.Module:
    return compiled(ALL)


@pytest.fixture
def base_logits() -> torch.Tensor:
    return logits(llama(4))


def test_the_first_adapter_is_active(model: nn.Module) -> None:
    assert model.active_adapters() == ["one"]
    assert_differ([logits(model)], [logits(llama(4))])
    assert torch.equal(logits(model), logits(compiled(ONE)))


def test_set_adapter(model: nn.Module) -> None:
    before = flags_and_modes(model)
    outputs = {}
    for names in ("one", "two", ["one", "two"], ["two", "one"], ("three",)):
        model.set_adapter(names)
        assert model.active_adapters() == ([names] if isinstance(names, str) else list(names))
        outputs[str(names)] = logits(model)
    assert relative(outputs["['two', 'one']"], outputs["['one', 'two']"]) < 1e-5
    del outputs["['two', 'one']"]
    for name, output in outputs.items():
        assert_differ([output] * 3, [o for n, o in outputs.items() if n != name])
    assert flags_and_modes(model) == before


def test_set_adapter_refuses_whole(model: nn.Module) -> None:
    before = snapshot(model)
    with pytest.raises(lora_fx.LoraFxError) as caught:
        model.set_adapter(["two", "tow", "here"])
    assert [d.message for d in caught.value.diagnostics] == [
        "there is no adapter `tow`",
        "there is no adapter `here`",
    ]
    assert caught.value.diagnostics[0].help == "the adapters are `one`, `two`, `three`"
    with pytest.raises(lora_fx.LoraFxError, match="named twice"):
        model.set_adapter(["two", "two"])
    assert_same(snapshot(model), before)


def test_disabled_is_the_base_model(model: nn.Module, base_logits: torch.Tensor) -> None:
    before, output = flags_and_modes(model), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)
        with model.disable_adapter():
            assert torch.equal(logits(model), base_logits)
        assert torch.equal(logits(model), base_logits)
    assert torch.equal(logits(model), output)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model), output)
    assert flags_and_modes(model) == before
    assert model.active_adapters() == ["one"]


def test_a_choice_made_while_disabled_holds_after(model: nn.Module) -> None:
    with model.disable_adapter():
        model.set_adapter("two")
        assert torch.equal(logits(model), logits(llama(4)))
    assert torch.equal(logits(model), logits(compiled(TWO)))


def test_disable_adapters_until_enabled(model: nn.Module, base_logits: torch.Tensor) -> None:
    before, output = flags_and_modes(model), logits(model)
    model.disable_adapters()
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model), base_logits)
    model.enable_adapters()
    assert torch.equal(logits(model), output)
    assert flags_and_modes(model) == before


def test_load_under_a_new_name(model: nn.Module, tmp_path: Path) -> None:
    peft_model().save_pretrained(tmp_path)
    before, output = flags_and_modes(model.train()), logits(model)
    model.load_adapter(tmp_path, "new")
    after = flags_and_modes(model)
    assert {name: after[name] for name in before} == before
    added = [value for name, value in after.items() if name not in before]
    assert all(value is True or value[1] is False for value in added)
    assert model.active_adapters() == ["one"]
    assert torch.equal(logits(model), output)
    model.load_adapter(tmp_path, "trainable", is_trainable=True)
    assert model.model.layers[0].mlp.up_proj.lora_A["trainable"].weight.requires_grad


def test_load_into_an_adapter_that_is_there(tmp_path: Path) -> None:
    other = compiled(ONE.replace("alpha = 5", "alpha = 2 seed = 9 dropout = 0.5"))
    other.save_pretrained(tmp_path)
    model = compiled(f"{ONE.replace('rank', 'compute = float32 rank')} {TWO}")
    before = snapshot(model)
    model.load_adapter(tmp_path / "one", "one")
    assert torch.equal(logits(model), logits(other.eval()))
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (same, address, flag, _) in ((n, v) for n, v in before.items() if len(v) == 4):
        if not name.endswith("_scalings"):
            assert after[name][:3] == (same, address, flag)
    arithmetic = model.model.layers[0].mlp.up_proj.lora_arithmetic["one"]
    assert (arithmetic.compute, arithmetic.dropout) == ("float32", 0.0)
    with pytest.raises(lora_fx.LoraFxError, match="other modules or ranks"):
        model.load_adapter(tmp_path / "one", "two")
    assert_same(snapshot(model), after)


def test_delete_adapter(model: nn.Module, base_logits: torch.Tensor) -> None:
    model.set_adapter(["one", "two"])
    model.delete_adapter("one")
    assert model.active_adapters() == ["two"]
    assert torch.equal(logits(model), logits(compiled(TWO)))
    model.delete_adapter("two")
    assert model.active_adapters() == ["three"]
    assert torch.equal(logits(model), logits(compiled(FROZEN)))
    model.delete_adapter("three")
    assert model.active_adapters() == []
    assert torch.equal(logits(model), base_logits)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in llama(4).named_parameters()}
    for call in (model.delete_adapter, model.set_adapter):
        with pytest.raises(lora_fx.LoraFxError, match="the model has none"):
            call("one")


def test_a_deleted_name_is_free_again(model: nn.Module, tmp_path: Path) -> None:
    peft_model().save_pretrained(tmp_path)
    model.delete_adapter("two")
    model.load_adapter(tmp_path, "two")
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(lora_fx.load(tmp_path, llama(4), backend=None)))


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "base", "__base__", "keys", "training"])
def test_names_that_are_refused(name: str, model: nn.Module, tmp_path: Path) -> None:
    peft_model().save_pretrained(tmp_path)
    before = snapshot(model)
    with pytest.raises(lora_fx.LoraFxError, match="cannot name an adapter"):
        model.load_adapter(tmp_path, name)
    assert_same(snapshot(model), before)


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    compiled(ONE).print_trainable_parameters()
    ours = capsys.readouterr().out
    peft_model().print_trainable_parameters()
    assert ours == capsys.readouterr().out
    assert ours.startswith("trainable params: 5,424 || all params: ")


def test_a_plain_module_has_the_methods_too() -> None:
    block = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    text = 'lora 1\nadapter one { rank = 2 init = random target "0" }'
    model = lora_fx.compile(block, text, backend=None)
    x = torch.randn(11, 5)
    assert relative(model(x), block(x)) > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(x), block(x))


def test_compiled_layers_follow(tmp_path: Path) -> None:
    """Nothing of the above is baked into a graph."""
    peft_model().save_pretrained(tmp_path)
    model, marked = (
        lora_fx.compile(llama(4), f"lora 1\n{ALL}", backend=b) for b in ("eager", None)
    )
    for change in (
        lambda m: None,
        lambda m: m.set_adapter(["one", "two"]),
        lambda m: m.disable_adapters(),
        lambda m: m.enable_adapters(),
        lambda m: m.load_adapter(tmp_path, "new"),
        lambda m: m.set_adapter(["new", "three"]),
        lambda m: m.delete_adapter("new"),
    ):
        for each in (model, marked):
            change(each)
        assert relative(logits(model), logits(marked)) < 1e-5


def test_loading_follows_each_module_s_own_mode(tmp_path: Path) -> None:
    model = lora_fx.compile(llama(), "lora 1\nadapter default { target linear }", backend=None)
    model.save_pretrained(tmp_path)
    model.train()
    model.model.layers[0].eval()
    before = {fqn: module.training for fqn, module in model.named_modules()}
    model.load_adapter(tmp_path, "other")
    after = {fqn: module.training for fqn, module in model.named_modules()}
    assert before.items() <= after.items()
    added = after.keys() - before.keys()
    assert added
    assert all(after[fqn] == (".layers.0." not in f".{fqn}") for fqn in added)
