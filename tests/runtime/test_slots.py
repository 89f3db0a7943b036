"""More adapters on disk than in memory: they come into slots and leave, and no graph is made."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.utils import counters

import lora_fx
from lora_fx.diagnostics import LoraFxError
from tests.dense import relative
from tests.runtime.test_combine import loaded_by_peft
from tests.runtime.test_mixed_generation import write
from tests.tiny import llama, step, tokens

OWN = """lora 1
adapter a { rank = 4  init = random  target linear, embed_tokens { lora_bias = false } }
"""
SPEC = OWN + "route { slots = 4  max_rank = 6 }"  # three are free
ADAPTERS = {
    "one": "rank = 3  alpha = 5  target q_proj, up_proj",
    "two": "rank = 6  scaling = rslora  target linear",
    "three": "rank = 2  scaling = 0.4  target embed_tokens, v_proj",
    "four": 'rank = 1  target "**.down_proj" { rank = 5  alpha = 9 } target o_proj',
    "five": "rank = 3  init = pissa  target q_proj, gate_proj",
    "six": "rank = 4  variant = velora(num_groups = 4)  target v_proj",
}
IDS = tokens(4, 17)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of adapters that all act, each by its name."""
    folder = tmp_path_factory.mktemp("disk")
    for seed, (name, text) in enumerate(ADAPTERS.items()):
        save(folder / name, text, seed)
    return folder


def save(folder: Path, text: str, seed: int = 0, layers: int = 2) -> Path:
    model: Any = lora_fx.compile(
        llama(layers), f"lora 1 adapter default {{ {text} }}", backend=None
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "start" not in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def of_peft(disk: Path, name: str) -> Tensor:
    return loaded_by_peft(disk / name, llama(2))(input_ids=IDS).logits


def served(backend: str | None = None, spec: str = SPEC) -> Any:
    return lora_fx.compile(llama(2), spec, backend=backend).eval()


@torch.no_grad()
def called(model: Any, *names: str) -> Tensor:
    return model(input_ids=IDS[: len(names)], adapter_names=list(names)).logits


def resident(model: Any) -> set[str]:
    return {name for name in model.get_model_status().slots if name}


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(None, marks=pytest.mark.slow),
        "eager",
        pytest.param("inductor", marks=pytest.mark.slow),
    ],
)
def test_a_hundred_mixes_swaps_and_loads_compile_nothing(backend: str | None, disk: Path) -> None:
    model, chosen = served(backend), random.Random(3)
    want = {name: of_peft(disk, name) for name in ADAPTERS}
    want["a"] = called(model, *["a"] * 4)
    with torch.no_grad():
        want["__base__"] = llama(2).eval()(input_ids=IDS).logits
    for name in ADAPTERS:
        model.register_adapter(disk / name, name)
    called(model, "a", "__base__", "a")
    model.set_adapter("one")
    with torch.no_grad():
        model(input_ids=IDS)
    model.set_adapter("a")
    counters.clear()
    seen = set()
    for i in range(100):
        if i % 10 == 9:  # another adapter active, by itself
            name = chosen.choice(list(ADAPTERS))
            model.set_adapter(name)
            with torch.no_grad():
                assert relative(model(input_ids=IDS).logits, want[name]) < 1e-5, name
            model.set_adapter("a")
        elif i % 5 == 4:
            name = chosen.choice(list(ADAPTERS))
            model.load_adapter(disk / name, name)
        names = [*chosen.sample(list(ADAPTERS), 2), *chosen.choices(["a", "__base__"], k=1)]
        chosen.shuffle(names)
        got = called(model, *names)
        seen |= resident(model)
        for row, name in enumerate(names):
            assert relative(got[row], want[name][row]) < 1e-5, (i, name)
            assert all(relative(got[row], want[o][row]) > 1e-3 for o in want if o != name)
    assert seen == set(ADAPTERS)
    assert counters["stats"]["unique_graphs"] == 0
    assert not counters["recompiles"]


def test_who_was_not_used_for_the_longest_time_goes(disk: Path) -> None:
    model = served()
    for name in ("one", "two", "three"):
        model.load_adapter(disk / name, name)
    called(model, "one", "a")
    model.load_adapter(disk / "four", "four")
    assert model.get_model_status().slots == ["one", "four", "three"]
    model(input_ids=IDS[:1], adapter_indices=torch.tensor([3]))  # the third slot
    model.load_adapter(disk / "five", "five")
    assert model.get_model_status().slots == ["five", "four", "three"]
    assert model.get_model_status().known_adapters == ["one", "two"]
    assert model.active_adapters() == ["a"]
    model.load_adapter(disk / "five", "four")  # whose place it keeps
    assert model.get_model_status().slots == ["five", "four", "three"]
    assert torch.equal(called(model, "four"), called(model, "five"))


def test_pinned_and_active_ones_stay(disk: Path) -> None:
    model = served()
    model.register_adapter(disk / "one", "one")
    model.pin_adapter("one")
    model.load_adapter(disk / "two", "two")
    model.set_adapter("two")
    for name in ("three", "four", "five"):
        model.load_adapter(disk / name, name)
        assert {"one", "two", name} == resident(model)
    model.pin_adapter("five")
    before = called(model, "one", "two", "five", "a")
    with pytest.raises(LoraFxError, match=r"no slot for `six`: all 3 are taken") as error:
        model.load_adapter(disk / "six", "six")
    assert "in slots are `one`, `two`, `five`; pinned of them `one`, `five`" in str(error.value)
    with pytest.raises(LoraFxError, match="no slot for `three`"):
        called(model, "three", "one", "a")
    assert resident(model) == {"one", "two", "five"}
    assert torch.equal(called(model, "one", "two", "five", "a"), before)
    model.unpin_adapter("one")
    model.load_adapter(disk / "six", "six")
    assert resident(model) == {"six", "two", "five"}


def test_active_ones_are_used(disk: Path) -> None:
    model = served()
    for name in ("one", "two", "three"):
        model.load_adapter(disk / name, name)
    model.set_adapter("one")
    model.set_adapter("a")
    model.load_adapter(disk / "four", "four")
    assert resident(model) == {"one", "three", "four"}
    for wrong in (["two", "nowhere"], ["two", "two"]):
        with pytest.raises(LoraFxError):
            model.set_adapter(wrong)
        assert resident(model) == {"one", "three", "four"}


def test_names_of_one_call_do_not_push_each_other_out(disk: Path) -> None:
    model = served(spec=OWN + "route { slots = 3  max_rank = 6 }")
    for name in ADAPTERS:
        model.register_adapter(disk / name, name)
    got = called(model, "one", "two")
    assert relative(got[1], of_peft(disk, "two")[1]) < 1e-5
    got = called(model, "two", "three")
    assert relative(got[0], of_peft(disk, "two")[0]) < 1e-5
    with pytest.raises(LoraFxError, match="no slot for `one`, `four`, `five`"):
        called(model, "one", "four", "five")
    assert resident(model) == {"two", "three"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank = 7 target q_proj", "its rank at `model.layers.*.self_attn.q_proj` is 7, and there"),
        ('rank = 2 target "lm_head"', "it adapts `lm_head`, which a slot does not"),
        ("rank = 2 variant = dora target q_proj", "it is `dora` at"),
        ("rank = 2 lora_bias = true target q_proj", "it has a bias on B at"),
        ('rank = 2 target q_proj train "model.norm"', "it trains `model.norm`, which a slot does"),
        ("rank = 2 target q_proj tokens [3]", "it trains rows 3 of `model.embed_tokens`"),
        (
            "rank = 4 init = pissa target q_proj",
            "its rank at `model.layers.*.self_attn.q_proj` is 8",
        ),
    ],
)
def test_what_has_no_room_in_a_slot(text: str, said: str, disk: Path, tmp_path: Path) -> None:
    model, folder = served(), save(tmp_path / "new", text)
    model.load_adapter(disk / "one", "one")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(LoraFxError) as error:
        model.load_adapter(folder, "new")
    assert f"`new` does not fit into a slot: {said}" in str(error.value)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert resident(model) == {"one"}


def test_all_that_is_wrong_is_said_of_all_and_nothing_is_done(disk: Path, tmp_path: Path) -> None:
    model = served()
    large = save(tmp_path / "large", "rank = 9 target q_proj")
    broken = save(tmp_path / "broken", "rank = 2 target q_proj")
    file = broken / "adapter_model.safetensors"
    state = load_file(file)
    next(iter(state.values())).fill_(torch.nan)
    save_file(state, file, {"format": "pt"})
    other = save(tmp_path / "other", "rank = 2 target q_proj", layers=3)
    for folder in (large, broken, other, disk / "one"):
        model.register_adapter(folder, folder.name)
    with pytest.raises(LoraFxError) as error:
        called(model, "one", "large", "broken", "other")
    for part in ("`large` does not fit", "holds NaN or infinity", "layers.2.self_attn.q_proj"):
        assert part in str(error.value)
    assert resident(model) == set()
    assert model.get_model_status().known_adapters == ["large", "broken", "other", "one"]
    assert relative(called(model, "one")[0], of_peft(disk, "one")[0]) < 1e-5


def test_names_that_are_nowhere(disk: Path) -> None:
    model = served()
    model.load_adapter(disk / "one", "one")
    model.register_adapter(disk / "two", "two")
    with pytest.raises(LoraFxError, match="no adapter and no mix `xyz`") as error:
        called(model, "two", "xyz")
    assert "known are `a`, `one`, `__base__`, `two`" in str(error.value)
    assert resident(model) == {"one"}
    with pytest.raises(LoraFxError, match="for 3 samples, and 4 samples"):
        model(input_ids=IDS, adapter_names=["two"] * 3)
    with pytest.raises(LoraFxError, match="no adapter and no mix `__slot_1__`"):
        called(model, "__slot_1__")
    assert resident(model) == {"one"}
    for name in ("__slot_1__", "__base__", "x.y"):
        with pytest.raises(LoraFxError, match="cannot name an adapter"):
            model.load_adapter(disk / "two", name)


def test_what_is_refused(disk: Path) -> None:
    model = served()
    with pytest.raises(LoraFxError, match="in a slot, where nothing is trained"):
        model.load_adapter(disk / "one", "one", is_trainable=True)
    model.load_adapter(disk / "one", "one")
    with pytest.raises(LoraFxError, match="there is an adapter `one` already"):
        model.register_adapter(disk / "one", "one")
    with pytest.raises(LoraFxError, match="`mix` would be made beside the slots"):
        model.add_weighted_adapter(["a", "one"], [0.5, 0.5], "mix", "cat")
    with pytest.raises(LoraFxError, match="`plain` would be made beside the slots"):
        model.convert_adapter("one", "plain", 2)
    model.merge_adapter("one")
    with pytest.raises(LoraFxError, match="`one` is merged"):
        model.load_adapter(disk / "one", "one")
    model.unmerge_adapter()
    plain: Any = lora_fx.compile(llama(2), OWN, backend=None)
    with pytest.raises(LoraFxError, match="the model has no slots"):
        plain.register_adapter(disk / "one", "one")
    assert plain.get_model_status().slots == []


def test_slots_do_not_change_while_the_model_runs(disk: Path) -> None:
    model = served()

    def load(*_: Any) -> None:
        model.load_adapter(disk / "one", "one")

    hook = model.model.layers[1].register_forward_pre_hook(load)
    with pytest.raises(LoraFxError, match="cannot change while the model runs"):
        called(model, "a")
    hook.remove()
    load()
    assert relative(called(model, "one")[0], of_peft(disk, "one")[0]) < 1e-5


def test_what_is_in_a_slot_is_saved_as_it_was(disk: Path, tmp_path: Path) -> None:
    model = served()
    for name in ("one", "four", "five"):
        model.load_adapter(disk / name, name)
    model.save_pretrained(tmp_path)
    for name in ("one", "four"):
        old, new = (load_file(f / name / "adapter_model.safetensors") for f in (disk, tmp_path))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)
        assert model.get_adapter_state_dict(name).keys() == old.keys()
    for name in ("one", "four", "five"):
        assert relative(of_peft(tmp_path, name), of_peft(disk, name)) < 1e-5
    again: Any = lora_fx.load(tmp_path, llama(2), backend=None).eval()
    assert resident(again) == {"one", "four", "five"}
    assert again.active_adapters() == ["a"]
    names = ["four", "one", "a", "five"]
    assert relative(called(again, *names), called(model, *names)) < 1e-5
    again.load_adapter(disk / "two", "two")
    assert relative(called(again, "two")[0], of_peft(disk, "two")[0]) < 1e-5


def test_a_deleted_adapter_leaves_its_slot(disk: Path) -> None:
    model = served()
    for name in ("one", "two", "three"):
        model.load_adapter(disk / name, name)
    model.set_adapter("two")
    model.delete_adapter("two")
    assert model.active_adapters() == ["a"]
    assert model.get_model_status().slots == ["one", None, "three"]
    with pytest.raises(LoraFxError, match="no mix `two`"):
        called(model, "two")
    empty = model(input_ids=IDS[:1], adapter_indices=torch.tensor([2])).logits
    assert torch.equal(empty, called(model, "__base__"))
    model.load_adapter(disk / "four", "four")
    assert model.get_model_status().slots == ["one", "four", "three"]
    model.register_adapter(disk / "two", "two")
    model.delete_adapter("two")
    assert model.get_model_status().known_adapters == []
    with pytest.raises(LoraFxError, match="there is no adapter `two`"):
        model.delete_adapter("two")


def test_status_and_plan(disk: Path) -> None:
    model, without = served(), lora_fx.plan(OWN, llama(2))
    planned = lora_fx.plan(SPEC, llama(2))
    model.load_adapter(disk / "four", "four")
    model.pin_adapter("four")
    status = model.get_model_status()
    assert (status.slots, status.pinned_adapters) == (["four", None, None], ["four"])
    assert status.adapter_bytes == planned.memory()["adapters"] + planned.memory()["slots"]
    assert planned.memory()["adapters"] == without.memory()["adapters"]
    assert planned.all == sum(p.numel() for p in model.parameters()) > without.all
    assert planned.trainable == without.trainable
    ranks = {one.name: one.ranks for one in model.get_layer_status()}
    assert ranks["model.layers.0.mlp.down_proj"] == {"a": 4, "four": 5}
    assert ranks["model.layers.0.self_attn.q_proj"] == {"a": 4}
    twin = copy.deepcopy(model)
    twin.load_adapter(disk / "one", "four")
    assert relative(called(twin, "four")[0], of_peft(disk, "one")[0]) < 1e-5
    assert relative(called(model, "four")[0], of_peft(disk, "four")[0]) < 1e-5


@pytest.mark.parametrize("backend", [None, "eager"])
def test_generate_brings_in_what_it_names(backend: str | None, disk: Path) -> None:
    model, ids = served(backend, OWN + "route { slots = 3  max_rank = 6 }"), tokens(3, 9)
    for name in ADAPTERS:
        model.register_adapter(disk / name, name)
    for names in (["two", "__base__", "one"], ["a", "four", "two"]):
        got = write(model, ids, adapter_names=names)
        for row, name in enumerate(names):
            alone: Any = llama(2).eval()
            if name in ADAPTERS:
                alone = lora_fx.load(disk / name, llama(2), backend=None).eval()
            elif name == "a":
                alone = served(spec=OWN)
            assert torch.equal(got[row], write(alone, ids[row : row + 1])[0]), name


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
def test_norms_and_biases_where_the_spec_has_them(disk: Path, tmp_path: Path) -> None:
    spec = """lora 1
adapter a { rank = 4 variant = dora init = random target v_proj, up_proj
            target q_proj { variant = lora } }
adapter b { rank = 2 lora_bias = true init = random target q_proj, up_proj }
route { slots = 4  max_rank = 5 }"""
    model = served("eager", spec)
    save(tmp_path / "dora", "rank = 3 variant = dora target v_proj")
    save(tmp_path / "biased", "rank = 5 lora_bias = true target q_proj")
    save(tmp_path / "plain", "rank = 2 target up_proj, v_proj, q_proj")
    model.load_adapter(tmp_path / "dora", "dora")
    called(model, "dora", "a", "b", "__base__")
    counters.clear()
    for name in ("biased", "plain", "dora", "plain", "biased"):
        model.load_adapter(tmp_path / name, name)
        got = called(model, name, "__base__", name, "a")
        assert relative(got[::2], of_peft(tmp_path, name)[:3:2]) < 1e-5
        assert relative(got[1], got[0]) > 1e-3
    assert counters["stats"]["unique_graphs"] == 0
    model.save_pretrained(tmp_path / "saved")
    for name in model.get_model_status().slots:
        assert relative(of_peft(tmp_path / "saved", name), of_peft(tmp_path, name)) < 1e-5


def test_adapters_of_the_spec_train_beside_those_in_slots(disk: Path) -> None:
    spec = OWN + "route { slots = 3  max_rank = 6  train = true }"
    model = served("eager", spec).train()
    model.load_adapter(disk / "one", "one")
    held = {n: p.clone() for n, p in model.named_parameters() if ".one." in n or "slot" in n}
    assert len(held) > 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    names = ["one", "a", "__base__", "a"]
    logits = model(input_ids=IDS, adapter_names=names).logits
    logits.square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert all(".a." in name for name in mixed)
    model.zero_grad()
    model.set_adapter("a")
    model(input_ids=IDS[[1, 3]]).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative(mixed[name], parameter.grad) < 1e-5, name
    optimizer.step()
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in held.items())
    model.register_adapter(disk / "two", "two")
    with pytest.raises(LoraFxError, match="`two` is in no slot, and a step of training"):
        model(input_ids=IDS, adapter_names=["two"] * 4)
    step(model, IDS)


def test_a_tied_embedding_in_a_slot(tmp_path: Path) -> None:
    base = {"tie_word_embeddings": True}
    spec = """lora 1 adapter a { rank = 4 tie = true init = random target embed_tokens }
route { slots = 2  max_rank = 5 }"""
    model: Any = lora_fx.compile(llama(2, **base), spec, backend="eager").eval()
    for name, rank in (("x", 3), ("y", 2)):
        text = f"tie = true rank = {rank} init = random target embed_tokens"
        text = f"lora 1 adapter default {{ {text} }}"
        other: Any = lora_fx.compile(llama(2, **base), text, backend=None).eval()
        other.save_pretrained(tmp_path / name)
        model.load_adapter(tmp_path / name, "t")
        with torch.no_grad():
            want = other(input_ids=IDS).logits
        assert relative(called(model, "t", "__base__")[0], want[0]) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    again: Any = lora_fx.load(tmp_path / "saved", llama(2, **base), backend=None).eval()
    assert relative(called(again, "t")[0], want[0]) < 1e-5
