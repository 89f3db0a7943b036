"""Adapters on convolutions: combined, merged from a checkpoint, swapped, counted."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

import lora_fx
from lora_fx.adapters import storage
from tests.adapters.convolutions import CASES
from tests.adapters.kinds import by_peft, ours, scatter, state_of
from tests.adapters.test_kinds import KINDS
from tests.architectures import CONVOLUTIONAL
from tests.dense import relative
from tests.example_inputs import example_inputs

TWO = """lora 1
adapter one {{ rank = {}  alpha = 3  init = random  lora_bias = {bias}  target class "{kind}" }}
adapter two {{ rank = {}  scaling = rslora  init = random  lora_bias = {bias}
    target class "{kind}" }}"""
WEIGHTS = {"one": 0.7, "two": -1.3}
MIX = {"adapters": list(WEIGHTS), "weights": list(WEIGHTS.values())}
LAYERS = ["1d", "2d, circular", "3d, line", "1d, groups", "2d, without bias"]


def two(name: str, ranks: tuple[int, int] = (2, 4), backend: str | None = None) -> Any:
    case = CASES[name]
    bias = str(case.settings.get("bias", True)).lower()
    text = TWO.format(*ranks, bias=bias, kind=case.kind.__name__)
    model = lora_fx.compile(case.layer(), text, backend=backend)
    for adapter in WEIGHTS:
        scatter(model, adapter)
    return model


def product(site: Any, adapter: str) -> Tensor:
    """s B A in float64, (out, in · k), of all inputs where there are groups."""
    factors = site.lora_branches[adapter].tensors()[:2]
    A, B = (factor.detach().double().flatten(1) for factor in factors)
    blocks = torch.block_diag(*B.chunk(A.shape[0] // B.shape[1]))
    return site.lora_arithmetic[adapter].scaling * blocks @ A


def wanted(model: Any) -> Tensor:
    return sum(weight * product(model[0], name) for name, weight in WEIGHTS.items())  # type: ignore[return-value]


@pytest.mark.parametrize("name", LAYERS)
def test_cat_is_the_sum(name: str) -> None:
    model, x = two(name), CASES[name].x()
    model.add_weighted_adapter(**MIX, adapter_name="new", combination_type="cat")
    assert relative(product(model[0], "new"), wanted(model)) < 1e-5
    with model.disable_adapter():
        base = model(x)
    outputs = {}
    for adapter in ("one", "two", "new"):
        model.set_adapter(adapter)
        outputs[adapter] = model(x) - base
    both = sum(weight * outputs[adapter] for adapter, weight in WEIGHTS.items())
    assert relative(outputs["new"], both) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [2, 4])
def test_svd_is_the_best_of_its_rank(name: str, rank: int) -> None:
    model, groups = two(name), CASES[name].groups
    model.add_weighted_adapter(**MIX, adapter_name="new", svd_rank=rank)
    assert model[0].lora_branches["new"].rank == rank
    best = []
    for rows in wanted(model).chunk(groups):
        U, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        kept = rank // groups
        best.append(U[:, :kept] * S[:kept] @ Vh[:kept])
    assert relative(product(model[0], "new"), torch.cat(best)) < 1e-5
    assert relative(torch.cat(best), wanted(model)) > 1e-3


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
@pytest.mark.parametrize("name", LAYERS)
def test_weight_one_of_one_adapter_is_the_identity(name: str, method: str) -> None:
    model = two(name)
    model.add_weighted_adapter(["two"], [1.0], "new", method)
    x = CASES[name].x()
    model.set_adapter("two")
    want = model(x)
    model.set_adapter("new")
    assert relative(model(x), want) < 1e-5
    model.set_adapter("one")
    assert relative(model(x), want) > 1e-2


def test_a_rank_that_no_groups_share() -> None:
    model = two("1d, groups")
    with pytest.raises(lora_fx.LoraFxError, match="rank 3 at `0`, which has 2 groups"):
        model.add_weighted_adapter(**MIX, adapter_name="new", svd_rank=3)
    assert list(model.lora_fx_adapters) == ["one", "two"]


def test_a_merge_that_is_compressed_by_group(tmp_path: Path) -> None:
    """Of factors that are summed each by itself, as of any others."""
    case = CASES["1d, groups"]
    two("1d, groups", (4, 4)).save_adapters(tmp_path)
    adapters = "lora 1\n" + "\n".join(
        f'adapter {name} {{ weights = "{tmp_path / name}" }}' for name in WEIGHTS
    )
    merge = "merge new {{ from 0.7 * one - 1.3 * two  method = linear {} }}"
    whole, compressed = (
        lora_fx.compile(case.layer(), adapters + merge.format(rank), backend=None)
        for rank in ("", "rank = svd(2)")
    )
    assert compressed[0].lora_branches["new"].rank == 2  # type: ignore[index]
    best = []
    for rows in product(whole[0], "new").chunk(2):
        U, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        best.append(U[:, :1] * S[:1] @ Vh[:1])
    assert relative(product(compressed[0], "new"), torch.cat(best)) < 1e-5
    assert relative(torch.cat(best), product(whole[0], "new")) > 1e-3


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
def test_combined_as_peft(method: str, tmp_path: Path) -> None:
    """Of one rank and α/r: of √r PEFT's result is √r times too large."""
    text = """lora 1
    adapter one { rank = 3  alpha = 5  init = random  target class "Conv2d" }
    adapter two { rank = 3  alpha = 2  init = random  target class "Conv2d" }"""
    base = KINDS["convolution"].base
    model: Any = lora_fx.compile(base(), text, backend=None)
    for name in WEIGHTS:
        scatter(model, name)
    model.save_pretrained(tmp_path)
    settings = {} if method == "linear" else {"density": 0.6}
    more = {"cross_terms": True} if method == "linear" else settings
    model.add_weighted_adapter(**MIX, adapter_name="new", combination_type=method, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base(), tmp_path / "one", "one").eval()
        theirs.load_adapter(tmp_path / "two", "two")
        theirs.add_weighted_adapter(
            **MIX,
            adapter_name="new",
            combination_type=method,
            **settings,  # type: ignore[arg-type]
        )
    model.set_adapter("new")
    theirs.set_adapter("new")
    inputs = example_inputs(base())
    assert relative(model(**inputs).logits, theirs(**inputs).logits) < 1e-5
    theirs.set_adapter("one")
    assert relative(model(**inputs).logits, theirs(**inputs).logits) > 1e-3


def test_what_was_combined_is_saved_and_loaded(tmp_path: Path) -> None:
    model = two("1d, groups")
    model.add_weighted_adapter(**MIX, adapter_name="new", svd_rank=2)
    model.save_adapters(tmp_path)
    model.set_adapter("new")
    x = CASES["1d, groups"].x()
    want = model(x)
    again: Any = two("1d, groups")
    again.load_adapter(tmp_path / "new", "new")
    assert relative(again(x), want) > 1e-2
    again.set_adapter("new")
    assert relative(again(x), want) < 1e-6
    again.delete_adapter("new")
    assert not [name for name, _ in again.named_parameters() if ".new" in name]


def test_merged_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dora = KINDS["dora on convolutions"]
    dora.base().save_pretrained("base")
    model = ours(replace(dora, adapter=dora.adapter.replace("dora", "lora")))
    model.save_pretrained("one")
    Path("a.lora").write_text(
        'lora 1 model "base" adapter one { weights = "one" }'
        'merge production { from one into = base save = "out" }'
    )
    lora_fx.merge("a.lora")
    inputs = example_inputs(model)
    got = AutoModelForImageClassification.from_pretrained("out").eval()
    assert relative(got(**inputs).logits, model(**inputs).logits) < 1e-5
    assert relative(dora.base()(**inputs).logits, got(**inputs).logits) > 1e-3


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["convolution", "dora on convolutions"])
def test_status_as_peft(name: str, merged: bool) -> None:
    model = ours(KINDS[name])
    theirs = by_peft(KINDS[name], state_of(model))
    if merged:
        model.merge_adapter()
        theirs.merge_adapter()
    wanted = {one.name.removeprefix("model."): one for one in theirs.get_layer_status()}
    found = {one.name: one for one in model.get_layer_status()}
    assert found.keys() == wanted.keys()
    fields = ("enabled", "active_adapters", "merged_adapters", "requires_grad", "devices")
    for fqn, one in found.items():
        assert all(getattr(one, f) == getattr(wanted[fqn], f) for f in fields), fqn
        own = sum(t.nbytes for t in storage.tensors(model.get_submodule(fqn), "default").values())
        held = model.get_submodule(fqn).lora_merged.tensors().values() if merged else ()
        assert one.bytes == own + sum(t.nbytes for t in held)
    assert model.get_model_status().trainable_params == theirs.get_model_status().trainable_params


def test_a_real_model_learns(tmp_path: Path) -> None:
    """With batch normalisation in training: the rewritten step is the marked one."""
    text = """lora 1
    adapter default { rank = 2  dropout = 0.2  target class "Conv2d"  train classifier }"""
    losses = []
    for backend in ("eager", None):
        model = lora_fx.compile(CONVOLUTIONAL["resnet"](), text, backend=backend).train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 0.02)
        torch.manual_seed(3)
        for _ in range(12):
            loss = model(**example_inputs(model)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    rewritten, marked = losses[:12], losses[12:]
    assert rewritten == pytest.approx(marked, rel=1e-3)
    assert rewritten[-1] < 0.7 * rewritten[0]


def test_moved_to_another_dtype_and_pickled(tmp_path: Path) -> None:
    model = two("2d, circular", backend="eager")
    model.set_adapter(["one", "two"])
    x = CASES["2d, circular"].x()
    want = model(x)
    torch.save(model, tmp_path / "model.pt")
    twin: nn.Module = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(twin) is type(model)
    assert torch.equal(twin(x), want)
    wide = model.double()(x.double())
    assert wide.dtype is torch.float64
    assert relative(wide, want) < 1e-6


@pytest.mark.slow
def test_inductor_on_a_real_model() -> None:
    """Without batch normalisation in training, which has no gradient of a magnitude."""
    text = """lora 1
    adapter default { rank = 2  init = random  variant = dora  target class "Conv2d" }
    compile { unit = model }"""
    results = []
    for backend in ("inductor", None):
        model = lora_fx.compile(CONVOLUTIONAL["resnet"](), text, backend=backend).eval()
        scatter(model)
        output = model(**example_inputs(model))
        output.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": output.logits, **grads})
    compiled, marked = results
    assert compiled.keys() == marked.keys()
    assert len(marked) == 1 + 3 * 15
    for name, tensor in marked.items():
        assert relative(compiled[name], tensor) < 1e-4, name


@pytest.mark.parametrize("backend", [None, "eager"])
def test_each_sample_of_a_mixed_batch_is_as_it_is_alone(backend: str | None) -> None:
    text = """lora 1
    adapter one { rank = 2  init = random  target class "Conv2d" }
    adapter two { rank = 3  init = random  variant = dora  target class "Conv2d" }
    route { when "half" -> 0.5 * one }"""
    model: Any = lora_fx.compile(CONVOLUTIONAL["resnet"]().eval(), text, backend=backend).eval()
    for name in ("one", "two"):
        scatter(model, name)
    images = example_inputs(model)["pixel_values"]
    names = ["two", "__base__", "one"]
    with torch.no_grad():
        got = model(pixel_values=images, adapter_names=names).logits
        for i, name in enumerate(names):
            model.set_adapter("one" if name == "__base__" else name)
            alone = model(pixel_values=images[i : i + 1]).logits[0]
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(pixel_values=images[i : i + 1]).logits[0]
            assert relative(got[i], alone) < 1e-5
            assert all(relative(got[j], alone) > 1e-2 for j in range(3) if j != i)


class OneByOne(nn.Sequential):
    """Convolves each sample by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self[0](sample) for sample in x])


def test_samples_without_a_batch_are_not_mixed() -> None:
    """Their channels would be taken for samples: here there are as many of both."""
    case = CASES["1d"]
    text = """lora 1 adapter one { rank = 5  init = random  target class "Conv1d" }
    route { default -> one }"""
    model: Any = lora_fx.compile(OneByOne(*case.layer()), text, backend=None).eval()
    x = torch.cat([case.x(), case.x()[:2]])
    with pytest.raises(lora_fx.LoraFxError, match="one sample without a batch"):
        model(x, adapter_names=["one", "__base__", "one", "one", "one"])
    want = model(x)
    with model.disable_adapter():
        assert relative(model(x), want) > 1e-2
