"""Adapters combined: the mathematics in float64, PEFT where it is right, and what is refused."""

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.merge_utils import magnitude_based_pruning, ties
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.combine.factors import _compressed
from lora_fx.adapters.combine.operators import Method, apply
from lora_fx.adapters.peft.keys import live_tensors
from tests.adapters.kinds import scatter
from tests.dense import relative
from tests.runtime.test_merge import logits
from tests.tiny import llama, tokens

SAME = """lora 1
adapter one { rank = 3 alpha = 5 init = random target q_proj, down_proj }
adapter two { rank = 3 alpha = 7 init = random target q_proj, up_proj }
"""
OTHER = SAME.replace("rank = 3 alpha = 7", "rank = 4 alpha = 7 scaling = rslora")
MIX: dict[str, Any] = {"adapters": ["one", "two"], "weights": [0.7, -1.3]}
SVD = ("svd", "ties_svd", "magnitude_prune_svd")
FACTORS = ("linear", "ties", "magnitude_prune")


def model(spec: str = SAME) -> Any:
    return lora_fx.compile(llama(2), spec, backend=None).eval()


def deltas(compiled: nn.Module, adapter: str) -> dict[str, Tensor]:
    """s B A of every site, in float64."""
    found = {}
    for fqn, site in storage.sites(compiled):
        if adapter in site.lora_branches:
            A, B, *_ = (t.detach().double() for t in site.lora_branches[adapter].tensors())
            found[fqn] = site.lora_arithmetic[adapter].scaling * B @ A
    return found


def exact_sum(compiled: nn.Module, **weights: float) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for adapter, weight in weights.items():
        for fqn, delta in deltas(compiled, adapter).items():
            found[fqn] = found.get(fqn, 0) + weight * delta
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    assert want
    for fqn, delta in want.items():
        assert relative(got[fqn], delta) < tolerance, fqn


@pytest.mark.parametrize("spec", [SAME, OTHER], ids=["one rank", "ranks and rslora"])
def test_cat_is_the_sum(spec: str) -> None:
    compiled = model(spec)
    compiled.add_weighted_adapter(**MIX, adapter_name="new", combination_type="cat")
    assert_same(deltas(compiled, "new"), exact_sum(compiled, one=0.7, two=-1.3))
    plan = {site.fqn: site for site in compiled.lora_fx_adapters["new"].sites}
    ranks = {fqn.rpartition(".")[2]: site.rank for fqn, site in plan.items()}
    second = 3 if spec == SAME else 4
    assert ranks == {"q_proj": 3 + second, "down_proj": 3, "up_proj": second}
    assert compiled.active_adapters() == ["one"]
    assert not any(t.requires_grad for t in live_tensors(compiled, "new").values())


@pytest.mark.parametrize("rank", [None, 2, 7, 9])
def test_svd_is_the_best_of_its_rank(rank: int | None) -> None:
    compiled = model(OTHER)
    compiled.add_weighted_adapter(**MIX, adapter_name="new", svd_rank=rank)
    for fqn, want in exact_sum(compiled, one=0.7, two=-1.3).items():
        got = deltas(compiled, "new")[fqn]
        known = {"down_proj": 3, "up_proj": 4, "q_proj": 4}[fqn.rpartition(".")[2]]
        left = torch.linalg.svdvals(want)[rank or known :].norm()
        assert abs((got - want).norm() - left) < 1e-5 * want.norm()
        assert torch.linalg.matrix_rank(got, rtol=1e-5) <= (rank or known)


def test_compression_makes_nothing_of_the_weight_s_size() -> None:
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            tensors = result if isinstance(result, tuple) else (result,)
            largest = max(largest, *(t.numel() for t in tensors if isinstance(t, Tensor)))
            return result

    A, B = torch.randn(3, 97), torch.randn(89, 3)
    with Sizes():
        small = _compressed(A, B, 2)
    assert largest <= 97 * 3
    assert small[0].shape == (2, 97)


def loaded_by_peft(folder: Path, base: nn.Module, name: str = "default") -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(base, folder, adapter_name=name).eval()


def by_peft(compiled: Any, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """The products of PEFT's combination of the same two adapters."""
    compiled.save_pretrained(folder)
    theirs = loaded_by_peft(folder / "one", llama(2), "one")
    theirs.load_adapter(folder / "two", "two")
    theirs.add_weighted_adapter(**MIX, adapter_name="new", **settings)
    found = {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A") and "new" in module.lora_A:
            fqn = name.removeprefix("base_model.model.")
            found[fqn] = module.get_delta_weight("new")
    return found


@pytest.mark.parametrize("method", ["cat", *SVD, *FACTORS])
def test_as_peft(method: str, tmp_path: Path) -> None:
    compiled = model()
    settings: dict[str, Any] = {"combination_type": method}
    if method not in ("cat", "linear", "svd"):
        settings |= {"density": 0.6}
    more = {"cross_terms": True} if method == "linear" else {}
    compiled.add_weighted_adapter(**MIX, adapter_name="new", **settings, **more)
    want = by_peft(model(), tmp_path, **settings)
    assert_same(deltas(compiled, "new"), want)
    apart = max(relative(want[f], d) for f, d in exact_sum(compiled, one=0.7, two=-1.3).items())
    assert (apart < 1e-5) == (method == "cat")


def test_clamped_as_peft(tmp_path: Path) -> None:
    """Of one direction, whose sign alone is free."""
    compiled = model()
    settings: dict[str, Any] = {"svd_rank": 1, "svd_clamp": 0.98}
    compiled.add_weighted_adapter(**MIX, adapter_name="new", **settings)
    compiled.add_weighted_adapter(**MIX, adapter_name="whole", svd_rank=1)
    got, whole = deltas(compiled, "new"), deltas(compiled, "whole")
    assert max(relative(got[fqn], whole[fqn]) for fqn in got) > 1e-3
    for site in (site for _, site in storage.sites(compiled)):
        A, B = site.lora_branches["new"].tensors()
        free = site.lora_branches["whole"].tensors()
        most = torch.quantile(torch.cat([t.flatten() for t in free]), 0.98)
        assert torch.equal(A, free[0].clamp(-most, most))
        assert torch.equal(B, free[1].clamp(-most, most))


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_operators_as_peft(sign: str) -> None:
    torch.manual_seed(0)
    stack = [torch.randn(7, 5) for _ in range(3)]
    weights = [0.5, -0.25, 2.0]
    generator = torch.Generator()
    for density in (0.3, 0.9):
        got = apply(Method("ties", density, sign), stack, weights, generator)
        want = ties(stack, torch.tensor(weights), density, sign)
        assert relative(got, want) < 1e-6
        got = apply(Method("magnitude_prune", density), stack, weights, generator)
        pruned = [magnitude_based_pruning(tensor, density) for tensor in stack]
        want = sum(w * p for w, p in zip(weights, pruned, strict=True))
        assert relative(got, want) < 1e-6
        assert relative(got, sum(w * t for w, t in zip(weights, stack, strict=True))) > 1e-2


def test_dare_drops_its_share_and_keeps_the_mean() -> None:
    tensor = torch.ones(200, 300)
    one, other, again = (
        apply(Method("dare_linear", 0.25), [tensor], [3.0], torch.Generator().manual_seed(seed))
        for seed in (1, 2, 1)
    )
    assert set(one.unique().tolist()) == {0.0, 12.0}
    assert abs(one.mean() - 3) < 0.05
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    both = [tensor, -2 * tensor]
    got = apply(Method("dare_ties", 0.25), both, [3.0, 5.0], torch.Generator().manual_seed(1))
    assert set(got.unique().tolist()) == {0.0, 12.0, -40.0}


def test_what_dare_drops_depends_on_the_seed_and_the_module() -> None:
    compiled = model()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = {"combination_type": "dare_linear", "density": 0.5, "seed": seed}
        compiled.add_weighted_adapter(**MIX, adapter_name=name, **settings)
    found = {name: deltas(compiled, name) for name in "abc"}
    for a, b in itertools.combinations("abc", 2):
        assert all(relative(found[a][fqn], found[b][fqn]) > 0.1 for fqn in found[a])
    twin = model()
    settings = {"combination_type": "dare_linear", "density": 0.5}
    twin.add_weighted_adapter(**MIX, adapter_name="a", **settings)
    assert all(torch.equal(found["a"][fqn], d) for fqn, d in deltas(twin, "a").items())


def test_linear_is_the_sum_and_takes_no_more_ranks_than_there_is_room_for() -> None:
    compiled = model(OTHER.replace("rank = 3", "rank = 17").replace("rank = 4", "rank = 20"))
    with pytest.raises(lora_fx.LoraFxError, match="rank 37"):
        compiled.add_weighted_adapter(**MIX, adapter_name="new", combination_type="cat")
    compiled.add_weighted_adapter(**MIX, adapter_name="new", combination_type="linear")
    assert_same(deltas(compiled, "new"), exact_sum(compiled, one=0.7, two=-1.3))
    plan = {site.fqn.rpartition(".")[2]: site for site in compiled.lora_fx_adapters["new"].sites}
    assert {name: site.rank for name, site in plan.items()} == {
        **{"q_proj": 32, "down_proj": 17, "up_proj": 20}
    }


FEATURES = {
    "rslora": "scaling = rslora",
    "dora": "variant = dora",
    "dora and rslora": "variant = dora scaling = rslora",
    "pissa": "init = pissa",
    "bdlora": 'variant = bdlora(a = ["q_proj"], b = ["up_proj"], blocks = 2, strict = false)',
    "velora": "variant = velora(num_groups = 4)",
    "kasa": "variant = kasa",
}


PAIRS = [
    (first, second)
    for first in FEATURES
    for second in ("rslora", "dora", "bdlora")
    if first not in ("pissa", "kasa") or second != "dora"  # norms of a weight that changes
]


def effective(compiled: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What an adapter makes of each base weight, less that weight: each input alone, in float64."""
    wide = copy.deepcopy(compiled).double()
    here = {f: site for f, site in storage.sites(wide) if adapter in site.lora_branches}
    found = []
    for active in ([adapter], []):
        wide.set_adapter(active)
        found.append({f: site(torch.eye(site.in_features).double()).T for f, site in here.items()})
    return {fqn: found[0][fqn] - found[1][fqn] for fqn in here}


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_whatever_they_are_the_mix_is_the_sum_of_what_each_does(
    first: str, second: str, method: str
) -> None:
    spec = f"""lora 1
    adapter one {{ rank = 4 alpha = 5 init = random {FEATURES[first]} target q_proj, down_proj }}
    adapter two {{ rank = 6 alpha = 7 init = random {FEATURES[second]} target q_proj, up_proj }}"""
    compiled = model(spec.replace("init = random init", "init"))
    for name in ("one", "two"):
        scatter(compiled, name)
    apart = {name: effective(compiled, name) for name in ("one", "two")}
    rank = 14 if method == "svd" else None
    compiled.add_weighted_adapter(**MIX, adapter_name="new", combination_type=method, svd_rank=rank)
    got = effective(compiled, "new")
    assert len(got) == 6
    for fqn, delta in got.items():
        one, two = (apart[name].get(fqn, torch.zeros_like(delta)) for name in ("one", "two"))
        assert relative(delta, 0.7 * one - 1.3 * two) < 3e-5, fqn
        assert relative(delta, one + two) > 0.1
    compiled.set_adapter("new")
    unmerged = logits(compiled)
    compiled.merge_adapter()
    assert relative(logits(compiled), unmerged) < 1e-4


def test_a_mix_of_dora_adapters_is_saved_loaded_and_read_by_peft(tmp_path: Path) -> None:
    base = llama(2)
    spec = SAME.replace("rank = 3", "variant = dora rank = 3", 1)
    compiled = lora_fx.compile(base, spec, backend=None).eval()
    for name in ("one", "two"):
        scatter(compiled, name)
    compiled.add_weighted_adapter(**MIX, adapter_name="new", combination_type="linear")
    compiled.set_adapter("new")
    want = logits(compiled)
    compiled.save_pretrained(tmp_path)
    loaded = lora_fx.load(tmp_path / "new", base, backend=None).eval()
    assert relative(logits(loaded), want) < 1e-5
    theirs = loaded_by_peft(tmp_path / "new", llama(2))
    with torch.no_grad():
        assert relative(theirs(tokens()).logits, compiled(tokens()).logits) < 1e-5
        assert relative(base(tokens()).logits, compiled(tokens()).logits) > 1e-3


def test_dora_adapters_that_leave_nothing_of_the_weight_are_refused() -> None:
    compiled = model(SAME.replace("rank = 3", "variant = dora rank = 3", 1))
    for name, tensor in live_tensors(compiled, "one").items():
        if "magnitude" in name:
            tensor.data.zero_()
    with pytest.raises(lora_fx.LoraFxError, match="leave nothing"):
        compiled.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new", "linear")


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties"])
def test_weight_one_is_the_identity_for_every_feature(method: str, feature: str) -> None:
    target = "target q_proj, up_proj target v_proj { rank = 2 alpha = 9 }"
    text = f"lora 1 adapter one {{ rank = 4 alpha = 5 init = random {FEATURES[feature]} {target} }}"
    compiled = model(text.replace("init = random init", "init"))
    scatter(compiled, "one")
    want = logits(compiled)
    more = {"density": 1.0} if method == "ties" else {}
    rank = 8 if method == "svd" else None
    compiled.add_weighted_adapter(["one"], [1.0], "new", method, rank, **more)
    compiled.set_adapter("new")
    assert relative(logits(compiled), want) < 3e-6
    compiled.set_adapter([])
    assert relative(logits(compiled), want) > 1e-2


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_weight_one_of_one_adapter_is_the_identity(method: str) -> None:
    text = """lora 1 adapter one {
      rank = 3 alpha = 5 scaling = rslora init = random bias = all lora_bias = true
      target q_proj, up_proj
      target v_proj { rank = 4 alpha = 9 }
      train "model.norm"
      tokens [3, 7, 50]
    }"""
    compiled = lora_fx.compile(llama(2, attention_bias=True, mlp_bias=True), text, backend=None)
    scatter(compiled.eval(), "one")
    want = logits(compiled)
    compiled.add_weighted_adapter(["one"], [1.0], "new", method)
    compiled.set_adapter("new")
    assert relative(logits(compiled), want) < 1e-6
    compiled.set_adapter([])
    assert relative(logits(compiled), want) > 1e-2


PARTS = """lora 1
adapter one {
  rank = 2 init = random bias = lora_only lora_bias = true target q_proj
  train "model.norm" tokens [3, 7]
}
adapter two {
  rank = 3 init = random bias = lora_only lora_bias = true target q_proj, k_proj
  train "model.norm" tokens [7, 50]
}
"""


def test_copies_biases_and_rows_are_summed_by_what_they_change() -> None:
    base = llama(2, attention_bias=True)
    compiled = lora_fx.compile(base, PARTS, backend=None)
    for name in ("one", "two"):
        scatter(compiled, name)
    compiled.add_weighted_adapter(**MIX, adapter_name="new", combination_type="cat")
    live = {name: live_tensors(compiled, name) for name in ("one", "two", "new")}
    parameters = {
        "model.norm.weight": base.model.norm.weight,
        **{
            f"model.layers.{i}.self_attn.{p}_proj.base_layer.bias": getattr(
                layer.self_attn, f"{p}_proj"
            ).bias
            for i, layer in enumerate(base.model.layers)
            for p in "qk"
        },
    }
    assert parameters.keys() <= live["new"].keys()
    for name, start in parameters.items():
        moves = [
            weight * (live[adapter][name] - start)
            for adapter, weight in (("one", 0.7), ("two", -1.3))
            if name in live[adapter]
        ]
        assert relative(live["new"][name], start + sum(moves)) < 1e-6
        assert relative(live["new"][name], start) > 1e-3
    rows = {n: live[n]["model.embed_tokens.token_adapter.trainable_tokens_delta"] for n in live}
    start = base.model.embed_tokens.weight[[3, 7, 50]]
    moves = torch.zeros_like(start)
    moves[[0, 1]] += 0.7 * (rows["one"] - start[[0, 1]])
    moves[[1, 2]] += -1.3 * (rows["two"] - start[[1, 2]])
    assert relative(rows["new"], start + moves) < 1e-6
    for i in range(2):
        name = f"model.layers.{i}.self_attn.q_proj.lora_B.bias"
        sums = 0.7 * 4 * live["one"][name] - 1.3 * 8 / 3 * live["two"][name]
        assert relative(live["new"][name], sums) < 1e-6


EMBEDDINGS = """lora 1
adapter one { rank = 2 alpha = 3 init = random target embed_tokens, q_proj }
adapter two { rank = 3 alpha = 5 init = random target embed_tokens, lm_head }
"""


def test_embeddings() -> None:
    compiled = model(EMBEDDINGS)
    compiled.add_weighted_adapter(**MIX, adapter_name="new", combination_type="cat")
    assert_same(deltas(compiled, "new"), exact_sum(compiled, one=0.7, two=-1.3))
    compiled.set_adapter("new")
    got = logits(compiled)
    compiled.set_adapter([])
    assert relative(got, logits(compiled)) > 1e-2


@pytest.mark.parametrize("spec", [OTHER, PARTS, EMBEDDINGS])
def test_what_was_combined_is_saved_and_loaded(spec: str, tmp_path: Path) -> None:
    base = llama(2, attention_bias=True)
    compiled = lora_fx.compile(base, spec, backend=None).eval()
    for name in ("one", "two"):
        scatter(compiled, name)
    compiled.add_weighted_adapter(**MIX, adapter_name="new", combination_type="cat")
    compiled.set_adapter("new")
    want = logits(compiled)
    compiled.save_pretrained(tmp_path)
    loaded = lora_fx.load(tmp_path / "new", base, backend=None).eval()
    assert relative(logits(loaded), want) < 1e-5
    theirs = loaded_by_peft(tmp_path / "new", llama(2, attention_bias=True))
    with torch.no_grad():
        assert relative(theirs(tokens()).logits, compiled(tokens()).logits) < 1e-5
        assert relative(base(tokens()).logits, compiled(tokens()).logits) > 1e-3


def test_the_new_adapter_is_one_like_others() -> None:
    compiled = model()
    compiled.add_weighted_adapter(**MIX, adapter_name="new", combination_type="cat")
    compiled.set_adapter("new")
    want = logits(compiled)
    for name in ("one", "two"):
        compiled.delete_adapter(name)
    assert torch.equal(logits(compiled), want)
    compiled.merge_adapter()
    assert relative(logits(compiled), want) < 1e-5


REFUSED = {
    "there is no adapter `three`": {"adapters": ["one", "three"], "weights": [1, 1]},
    "2 adapters and 1 weights": {"adapters": ["one", "two"], "weights": [1]},
    "named twice": {"adapters": ["one", "one"], "weights": [1, 1]},
    "finite": {**MIX, "weights": [1, float("nan")]},
    "there is no `sum`": {**MIX, "combination_type": "sum"},
    "needs a `density`": {**MIX, "combination_type": "ties"},
    "takes no `density`": {**MIX, "density": 0.5},
    "takes no `svd_rank`": {**MIX, "combination_type": "cat", "svd_rank": 3},
    "`total` or `frequency`": {**MIX, "majority_sign_method": "most"},
    "takes no `cross_terms`": {**MIX, "cross_terms": True},
    "combines adapters of one rank": {**MIX, "combination_type": "linear", "cross_terms": True},
    "where at most 32": {**MIX, "svd_rank": 33},
    "there is an adapter `two` already": {**MIX, "adapter_name": "two"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str) -> None:
    compiled = model(OTHER)
    before = {name: id(tensor) for name, tensor in compiled.named_parameters()}
    with pytest.raises(lora_fx.LoraFxError, match=message):
        compiled.add_weighted_adapter(**{"adapter_name": "new", **REFUSED[message]})
    assert {name: id(tensor) for name, tensor in compiled.named_parameters()} == before
    assert list(compiled.lora_fx_adapters) == ["one", "two"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [("init = loftq", "put another weight"), ("variant = dora", "has `lora_bias`")],
)
def test_what_is_no_sum_of_products(settings: str, message: str) -> None:
    one = "adapter one { rank = 2 lora_bias = true target q_proj }"
    text = f"lora 1 {one} adapter two {{ {settings} rank = 2"
    with pytest.raises(lora_fx.LoraFxError, match=message):
        model(f"{text} target q_proj }}").add_weighted_adapter(**MIX, adapter_name="new")


def test_one_adapts_what_the_other_trains() -> None:
    text = """lora 1 adapter one { rank = 2 target q_proj }
    adapter two { rank = 2 target v_proj train "model.layers.1.self_attn.q_proj" }"""
    with pytest.raises(lora_fx.LoraFxError, match="`two` trains"):
        model(text).add_weighted_adapter(**MIX, adapter_name="new")


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("case", ["a convolution's start", "DoRA in float64"])
def test_one_adapter_of_weight_one_is_itself(case: str, method: str) -> None:
    torch.manual_seed(0)
    if case == "DoRA in float64":
        base, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(2, 6).double()
        text = "lora 1 adapter a { rank = 2 variant = dora target linear }"
    else:
        base, x = nn.Sequential(nn.Conv1d(4, 5, 3)), torch.randn(2, 4, 7)
        text = 'lora 1 adapter a { rank = 2 init = pissa target "0" }'
    made: Any = lora_fx.compile(base, text, backend=None).eval()
    scatter(made, "a")
    want = made(x)
    made.add_weighted_adapter(["a"], [1.0], "n", method, svd_rank=5 if method == "svd" else None)
    made.set_adapter("n")
    assert relative(made(x), want) < 1e-5
    assert relative(base(x), want) > 1e-2
