"""Each sample of a mixed batch is what it is alone."""

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.sites.magnitudes import effective_delta
from lora_fx.diagnostics import LoraFxError
from tests.dense import relative
from tests.runtime.mixed import NAMES, SPEC, alone, mixed, samples
from tests.tiny import llama

BACKENDS = [None, "eager", "inductor"]


@torch.no_grad()
def dense(model: Any, shares: dict[str, float], ids: Tensor) -> Tensor:
    """A float64 base with the effective deltas in its weights; without biases of B."""
    base = llama(2).double().eval()
    for fqn, site in storage.sites(model):
        weight = base.get_submodule(fqn).weight
        for name, share in shares.items():
            if name in site.lora_branches:
                delta = share * effective_delta(site, name).double()
                weight += delta if isinstance(site, nn.Linear) else delta.t()
    return base(input_ids=ids).logits


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_each_sample_is_as_it_is_alone(backend: str | None) -> None:
    model, ids = mixed(backend=backend), samples()
    got = model(input_ids=ids, adapter_names=NAMES).logits
    for i, name in enumerate(NAMES):
        if name not in ("half", "dora"):
            want = alone(model, name, input_ids=ids[i : i + 1])[0]
            assert relative(got[i], want) < 1e-5, name
    wrong = alone(model, "b", input_ids=ids)
    assert all(relative(got[i], wrong[i]) > 1e-2 for i, name in enumerate(NAMES) if name != "b")


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_mix_is_a_sum_of_effective_deltas(backend: str | None) -> None:
    model, ids = mixed(backend=backend), samples()
    got = model(input_ids=ids, adapter_names=NAMES).logits
    of_mixes = {3: {"a": 0.5, "b": -0.25}, 6: {"d": 0.4, "a": 1.0}, 0: {"b": 1.0}, 2: {}}
    for i, shares in of_mixes.items():
        assert relative(got[i], dense(model, shares, ids[i : i + 1])[0]) < 1e-5
    assert relative(got[3], dense(model, {"a": 0.5, "b": 0.25}, ids[3:4])[0]) > 1e-2
    assert relative(got[6], dense(model, {"d": 1.0, "a": 1.0}, ids[6:7])[0]) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_samples_of_the_base_are_the_base_bit_for_bit(backend: str | None) -> None:
    model, ids = mixed(backend=backend), samples()
    some = [name if i % 2 else "__base__" for i, name in enumerate(NAMES)]
    got = model(input_ids=ids, adapter_names=some).logits
    base = model(input_ids=ids, adapter_names=["__base__"] * len(ids)).logits
    assert torch.equal(got[::2], base[::2])
    assert not torch.equal(got[1::2], base[1::2])
    with model.disable_adapter():
        without = model(input_ids=ids).logits
    if backend != "inductor":  # which computes the rest of another graph in another order
        assert torch.equal(base, without)
    assert relative(base, without) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_in_other_dtypes(backend: str | None, dtype: torch.dtype) -> None:
    model, ids = mixed(backend=backend).to(dtype), samples()
    got = model(input_ids=ids, adapter_names=NAMES).logits
    assert got.dtype is dtype
    bound = 5 * torch.finfo(dtype).eps if dtype is torch.bfloat16 else 1e-12
    for i in (0, 1, 2, 4, 5):
        assert relative(got[i], alone(model, NAMES[i], input_ids=ids[i : i + 1])[0]) < bound
    with model.disable_adapter():
        assert torch.equal(got[2], model(input_ids=ids).logits[2])


@torch.no_grad()
def test_a_whole_model_in_one_graph() -> None:
    model, ids = mixed(f"{SPEC}\ncompile {{ unit = model }}", backend="eager"), samples()
    want = mixed(backend=None)(input_ids=ids, adapter_names=NAMES).logits
    assert relative(model(input_ids=ids, adapter_names=NAMES).logits, want) < 1e-5
    other = [*NAMES[1:], NAMES[0]]
    before = counters["stats"]["unique_graphs"]
    assert relative(model(input_ids=ids, adapter_names=other).logits, want) > 1e-2
    assert counters["stats"]["unique_graphs"] == before


@torch.no_grad()
def test_indices_are_rows_of_the_names() -> None:
    model, ids = mixed(backend=None), samples()
    rows = torch.tensor([1, 0, -1, 4, 3, 2, 5, 0], dtype=torch.int32)
    by_names = model(input_ids=ids, adapter_names=NAMES).logits
    assert torch.equal(model(input_ids=ids, adapter_indices=rows).logits, by_names)
    assert not torch.equal(model(input_ids=ids, adapter_indices=rows.flip(0)).logits, by_names)


@torch.no_grad()
def test_disabled_adapters_stay_disabled() -> None:
    model, ids = mixed(backend=None), samples()
    with model.disable_adapter():
        got = model(input_ids=ids, adapter_names=NAMES).logits
        assert torch.equal(got, model(input_ids=ids).logits)
        with pytest.raises(LoraFxError, match="no mix `x`"):
            model(input_ids=ids, adapter_names=["x"] * len(ids))
    assert not torch.equal(got, model(input_ids=ids, adapter_names=NAMES).logits)


@torch.no_grad()
def test_merged_adapters_are_refused_and_afterwards_all_is_well() -> None:
    model, ids = mixed(backend=None), samples()
    before = model(input_ids=ids, adapter_names=NAMES).logits
    model.merge_adapter("a")
    with pytest.raises(LoraFxError, match="`a` is merged") as error:
        model(input_ids=ids, adapter_names=NAMES)
    assert "unmerge_adapter()" in str(error.value)
    model.unmerge_adapter()
    assert torch.equal(model(input_ids=ids, adapter_names=NAMES).logits, before)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"adapter_names": ["a"]}, "names of adapters for 1 samples, and 8 samples"),
        ({"adapter_names": ["a", "q", "style", *["a"] * 6]}, "no adapter and no mix `q`"),
        ({"adapter_names": "a"}, "a list of text"),
        ({"adapter_names": ["a"] * 8, "adapter_indices": torch.zeros(8).int()}, "both"),
        ({"adapter_indices": torch.zeros(8)}, "whole numbers"),
        ({"adapter_indices": torch.zeros(7).int()}, "for 7 samples, and 8 samples"),
        ({"adapter_indices": torch.full((8,), 6)}, "from -1, the base, to 5"),
        ({"adapter_indices": torch.full((8,), -2)}, "from -1, the base, to 5"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_is_refused_and_leaves_nothing_behind(call: dict, said: str) -> None:
    model, ids = mixed(backend=None), samples()
    before = model(input_ids=ids).logits
    with pytest.raises(LoraFxError, match=said):
        model(input_ids=ids, **call)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.lora_fx_routing.shares is None


@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_an_error_inside_leaves_nothing_behind(backend: str | None) -> None:
    model, ids = mixed(backend=backend), samples()
    plain, routed = model(input_ids=ids).logits, model(input_ids=ids, adapter_names=NAMES).logits

    def fails(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = model.model.layers[1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(input_ids=ids, adapter_names=NAMES)
    hook.remove()
    assert torch.equal(model(input_ids=ids).logits, plain)
    assert torch.equal(model(input_ids=ids, adapter_names=NAMES).logits, routed)


@torch.no_grad()
def test_the_default_is_what_a_call_without_names_gets() -> None:
    ids = samples()
    to_half = SPEC.replace("route {", "route { default -> 0.5 * a - 0.25 * b")
    model = mixed(to_half, backend=None)
    assert torch.equal(
        model(input_ids=ids).logits, model(input_ids=ids, adapter_names=["half"] * len(ids)).logits
    )
    model.set_adapter("b")
    assert relative(model(input_ids=ids).logits, alone(model, "b", input_ids=ids)) == 0
    for default, name in (("base", "__base__"), ("c", "c")):
        model = mixed(SPEC.replace("route {", f"route {{ default -> {default}"), backend=None)
        got = model(input_ids=ids).logits
        assert torch.equal(got, alone(model, name, input_ids=ids))
        assert not torch.equal(got, alone(model, "a", input_ids=ids))


@torch.no_grad()
def test_the_argument_has_the_name_that_the_spec_gives_it() -> None:
    model = mixed(SPEC.replace("route {", 'route { by = argument("who")'), backend=None)
    ids, twin = samples(), mixed(backend=None)
    got = model(input_ids=ids, who=NAMES).logits
    assert torch.equal(got, twin(input_ids=ids, adapter_names=NAMES).logits)


@pytest.mark.parametrize("how", ["init = pissa", "variant = kasa"])
@torch.no_grad()
def test_an_adapter_that_changed_the_weight_is_out_of_other_samples(how: str) -> None:
    spec = f"""lora 1
adapter p {{ rank = 4 alpha = 6 {how} target q_proj, up_proj }}
adapter a {{ rank = 3 init = random target o_proj, down_proj }}
route {{ when "part" -> 0.3 * p + a }}
"""
    model, ids = mixed(spec, backend=None), samples(4)
    got = model(input_ids=ids, adapter_names=["p", "__base__", "a", "part"]).logits
    for i, name in enumerate(["p", "__base__", "a"]):
        assert relative(got[i], alone(model, name, input_ids=ids[i : i + 1])[0]) < 1e-5
    assert relative(got[1], llama(2).eval()(input_ids=ids[1:2]).logits[0]) < 1e-5
    mixes = [{"p": 0.3, "a": 1.0}, {"p": 1.0, "a": 1.0}]
    right, wrong = (changed(model, mix, ids[3:]) for mix in mixes)
    assert relative(got[3], right[0]) < 1e-5
    assert relative(got[3], wrong[0]) > 1e-3


def changed(model: Any, shares: dict[str, float], ids: Tensor) -> Tensor:
    """The base plus share (W_res + s B A - W) of the adapter that left W_res, and other deltas."""
    base = llama(2).double().eval()
    for fqn, site in storage.sites(model):
        weight = base.get_submodule(fqn).weight
        original = weight.clone()
        for name in shares.keys() & site.lora_branches.keys():
            delta = effective_delta(site, name).double()
            if site.lora_change is not None and site.lora_change.adapter == name:
                delta += site.weight.double() - original
            weight += shares[name] * delta
    return base(input_ids=ids).logits


def test_any_module_is_routed() -> None:
    """Not a `PreTrainedModel`, and in two dimensions."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    spec = """lora 1
adapter a { rank = 2 init = random target "0" }
adapter b { rank = 1 init = random target linear }"""
    model = lora_fx.compile(base, spec, backend="eager").eval()
    x = torch.randn(3, 5)
    got = model(x, adapter_names=["b", "__base__", "a"])
    assert relative(got[1], base(x)[1]) == 0
    for i, name in ((0, "b"), (2, "a")):
        model.set_adapter(name)
        assert relative(got[i], model(x)[i]) < 1e-6
        assert relative(got[i], base(x)[i]) > 1e-2


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_hundred_mixes_compile_nothing(backend: str) -> None:
    model, chosen = mixed(backend=backend), random.Random(5)
    known = ["a", "b", "c", "d", "half", "dora", "__base__"]
    for count in (5, 8):
        model(input_ids=samples(count), adapter_names=["a"] * count)
    counters.clear()
    for count in chosen.choices((5, 8), k=100):
        model(input_ids=samples(count), adapter_names=chosen.choices(known, k=count))
    assert counters["stats"]["unique_graphs"] == 0
    assert not counters["recompiles"]
    model(input_ids=samples(5)[:, :3].repeat(1, 7), adapter_names=["a"] * 5)
    model.set_adapter("b")
    model(input_ids=samples(5))
    assert counters["stats"]["unique_graphs"] > 0  # what is compiled is counted


def test_a_mixed_step_reads_no_value() -> None:
    """What does not happen uncompiled is not in the graph either."""
    model, ids = mixed(backend=None).train(), samples()
    with Waits() as waits:
        model(input_ids=ids, adapter_names=NAMES).logits.sum().backward()
    assert waits.seen == []
    with Waits() as waits:
        model(input_ids=ids, adapter_names=NAMES).logits.sum().item()
    assert len(waits.seen) == 1


class Waits(TorchDispatchMode):
    """Notes what a device would be waited for: values that are read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_saved_model_is_routed_as_it_was(tmp_path: Path) -> None:
    spec = SPEC.replace("route {", "route { default -> 0.5 * a - 0.25 * b")
    model, ids = mixed(spec, backend=None), samples()
    model.save_pretrained(tmp_path)
    loaded = lora_fx.load(tmp_path, llama(2), backend=None).eval()
    names = [*NAMES[:-1], "half"]
    want = model(input_ids=ids, adapter_names=names).logits
    assert relative(loaded(input_ids=ids, adapter_names=names).logits, want) < 1e-6
    assert relative(loaded(input_ids=ids).logits, model(input_ids=ids).logits) < 1e-6
    assert relative(loaded(input_ids=ids).logits, alone(model, "a", input_ids=ids)) > 1e-2


@torch.no_grad()
def test_adapters_that_come_and_go(tmp_path: Path) -> None:
    """A loaded one has a name like the others; mixes need all that they consist of."""
    model, ids = mixed(backend=None), samples(3)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "b", "again")
    names = ["again", "b", "__base__"]
    got = model(input_ids=ids[:1].expand(3, -1), adapter_names=names).logits
    assert relative(got[0], got[1]) < 1e-6
    assert relative(got[0], got[2]) > 1e-2
    model.delete_adapter("b")
    for name in ("b", "half"):
        with pytest.raises(LoraFxError, match=f"no mix `{name}`"):
            model(input_ids=ids, adapter_names=[name, "a", "a"])
    assert relative(model(input_ids=ids[:1], adapter_names=["again"]).logits[0], got[0]) < 1e-6
    small = mixed(SPEC.replace("route {", "route { max_rank = 5"), backend=None)
    wide = "lora 1 adapter w { rank = 6 target q_proj }"
    lora_fx.compile(llama(2), wide, backend=None).save_pretrained(tmp_path / "wide")
    with pytest.raises(LoraFxError, match="has rank 6, and `max_rank` is 5"):
        small.load_adapter(tmp_path / "wide" / "w", "w")
    assert "w" not in small.lora_fx_adapters
    names = list(small.lora_fx_adapters)
    with pytest.raises(LoraFxError, match="has rank 6, and `max_rank` is 5"):
        small.convert_adapter(names[0], "w", 6)
    with pytest.raises(LoraFxError, match="and `max_rank` is 5"):
        small.add_weighted_adapter(names, [1.0] * len(names), "w", "svd", svd_rank=6)
    assert list(small.lora_fx_adapters) == names


CONVOLVING = """lora 1
adapter a { rank = 2 scaling = 2 lora_bias = true init = random target linear, class "Conv2d" }
adapter b { rank = 1 scaling = 2 variant = dora init = random target class "Conv2d" }
"""


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
@torch.no_grad()
def test_convolutions_are_routed(backend: str | None) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 2), nn.Flatten()
    base = nn.Sequential(*layers, nn.Linear(4 * 6 * 4, 5)).eval()
    model = lora_fx.compile(base, CONVOLVING, backend=backend).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.normal_(std=0.3)
    x = torch.randn(4, 3, 7, 5)
    names = ["b", "__base__", "a", "b"]
    got = model(x, adapter_names=names)
    for i, name in enumerate(names):
        model.set_adapter([] if name == "__base__" else name)
        assert relative(got[i], model(x[i : i + 1])[0]) < 1e-5
        assert relative(got[i], base(x[i : i + 1])[0]) > 1e-2 or name == "__base__"


@torch.no_grad()
def test_beside_a_call_in_another_thread_it_is_refused() -> None:
    model, ids = mixed(backend=None), samples(3)
    names = ["a", "__base__", "b"]
    want = model(input_ids=ids, adapter_names=names).logits
    inside, done = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert done.wait(60)

    found: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            found.append(model(input_ids=ids, adapter_names=names).logits)

    hook = model.model.layers[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(60)
    hook.remove()
    for call in ({}, {"adapter_names": names}):
        with pytest.raises(LoraFxError, match="in another thread"):
            model(input_ids=ids, **call)
    done.set()
    thread.join()
    assert torch.equal(found[0], want)
    assert torch.equal(model(input_ids=ids, adapter_names=names).logits, want)
    assert not torch.equal(model(input_ids=ids).logits, want)
