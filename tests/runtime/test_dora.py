"""DoRA compiled: the same gradients, nothing as large as a weight on the way, no more graphs."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx.adapters import storage
from lora_fx.graph import references
from lora_fx.graph.row_norms import row_norms
from lora_fx.passes.aten import accumulate_products as sums
from tests.adapters.kinds import scatter
from tests.adapters.varied import IDS
from tests.adapters.varied import compiled as varied
from tests.dense import relative
from tests.odd_models import Varied
from tests.runtime.artifact.made import build, one_program_each
from tests.runtime.artifact.made import text as artifact_text
from tests.tiny import assert_equal, checkpointing, graphs, llama, spec, step, tokens, uncached

DORA = "rank = 3  alpha = 5  variant = dora"


def compiled(backend: str | None, more: str = "", layers: int = 2) -> Any:
    model = lora_fx.compile(llama(layers), spec(adapter=DORA, more=more), backend=backend)
    scatter(model)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        "layout = plain",
        "layout = augmented",
        pytest.param("unit = model", marks=pytest.mark.slow),
        pytest.param("checkpoint = layers", marks=pytest.mark.slow),
        pytest.param("checkpoint = budget(0.3)", marks=pytest.mark.slow),
    ],
)
def test_a_step_of_inductor(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_LEAST", 0)
    text = f"lora 1 adapter default {{ {DORA} init = random target linear }}"
    with uncached():
        model = lora_fx.compile(llama(1), f"{text} compile {{ {settings} }}")
        marked = lora_fx.compile(llama(1), text, backend=None)
        for one in (model, marked):
            scatter(one)
        want = step(marked, tokens())
        assert_equal(step(model, tokens()), want)
    magnitudes = [name for name in want if "magnitude" in name]
    assert len(magnitudes) == 7


def test_recomputed_in_the_backward_pass() -> None:
    models = compiled("eager"), compiled(None)
    want = step(compiled(None), tokens())
    for model in models:
        checkpointing(model.train(), reentrant=False)
        assert_equal(step(model, tokens()), want)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_under_autocast(backend: str | None) -> None:
    """Norms are computed in the weight's own dtype all the same."""
    model = compiled(backend)
    exact = step(model, tokens())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = step(model, tokens())
    for name, tensor in exact.items():
        assert 1e-5 < relative(got[name], tensor) < 0.2, name
    site = model.model.layers[0].mlp.up_proj
    A, B, _ = storage.tensors(site, "default").values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = row_norms(site.weight, A, B, 5 / 3)
    assert torch.equal(under, row_norms(site.weight, A, B, 5 / 3))


def test_gradients_beside_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, of a loss whose norms are what they are at the point: they are constants."""
    model = varied("variant = dora  target up, mix, embed", None).eval().double()
    fixed = {}

    def norms_at_the_point(W: Tensor, A: Tensor, B: Tensor, scaling: Tensor) -> Tensor:
        return fixed.setdefault(A.data_ptr(), row_norms(W, A, B, scaling))

    monkeypatch.setattr(references, "row_norms", norms_at_the_point)

    def loss() -> Tensor:
        return model(IDS).square().mean()

    loss().backward()
    assert len(fixed) == 3
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "embedding_A" in name:
            direction[:, 0] = 0  # of the padding token, which learns nothing
        slope = (parameter.grad * direction).sum()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-5 * direction)
                ends.append(loss())
                parameter.sub_(sign * 1e-5 * direction)
        numeric = (ends[0] - ends[1]) / 2e-5
        assert slope.abs() > 1e-6, name
        assert abs(numeric - slope) < 1e-7 * max(1, abs(slope)), name


class Sizes(TorchDispatchMode):
    """Notes how many elements new tensors have, forward and backward."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {_place(tensor) for tensor in known}
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and _place(tensor) not in self.known:
                self.sizes.add(tensor.numel())
        return result


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


UP, MIX, EMBED = 42, 42, 66  # elements of the weights; of no other tensor in a step
SEVERAL = """lora 1
adapter default { rank = 2  variant = dora  init = random  target up, mix, embed }
adapter other { rank = 1  variant = dora  init = random  target up, mix, embed }
"""


def untied() -> Varied:
    base = Varied().eval()
    base.head = nn.Linear(6, 13, bias=False)
    return base


def with_dropout(text: str) -> str:
    return text.replace("variant = dora", "variant = dora  dropout = 0.2").replace(", embed", "")


class Dense(nn.Module):
    """What DoRA is, with the weight materialised: the control."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        up = self.model.up
        A, B, m = storage.tensors(up, "default").values()
        W = up.weight + B @ A
        x = torch.tanh(self.model.embed(ids)).float() @ torch.ones(6, 7)
        return nn.functional.linear(x, W * (m / W.detach().norm(dim=1))[:, None])


@pytest.mark.parametrize("text", [SEVERAL, with_dropout(SEVERAL)], ids=["several", "dropout"])
def test_nothing_is_as_large_as_a_weight(text: str) -> None:
    model = lora_fx.compile(untied(), text, backend=None)
    model.set_adapter(["default", "other"])
    model.up.train(), model.mix.train()
    assert sizes_of(model, model) & {UP, MIX, EMBED} == set()
    assert UP in sizes_of(Dense(model), model)


def sizes_of(run: Callable[[Tensor], Tensor], model: nn.Module) -> set[int]:
    with Sizes([*model.parameters(), *model.buffers()]) as seen:
        run(IDS).square().mean().backward()
    return seen.sizes


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        (SEVERAL, torch.float32),
        (SEVERAL, torch.bfloat16),
        (with_dropout(SEVERAL), torch.float32),
    ],
    ids=["several", "bfloat16", "dropout"],
)
def test_nothing_of_inductor_is_as_large_as_a_weight(text: str, dtype: torch.dtype) -> None:
    with uncached():
        model = lora_fx.compile(untied().to(dtype), text)
        model.set_adapter(["default", "other"])
        model.up.train(), model.mix.train()
        found = list(buffers(model))
        assert any(set(shape) >= {12, 7} for shape in found)
        assert [s for s in found if torch.Size(s).numel() in (UP, MIX, EMBED)] == []
        control = torch.compile(Dense(model))
        assert (6, 7) in {tuple(shape) for shape in buffers(control)}


def buffers(run: Callable[[Tensor], Tensor]) -> Iterator[list[int]]:
    """The shapes of the buffers that Inductor's code allocates, forward and backward."""
    _, codes = run_and_get_code(lambda: run(IDS).square().mean().backward())
    assert len(codes) == 2
    for shape in re.findall(r"= empty_strided_cpu\w*\(\(([\d, ]+)\)", "".join(codes)):
        yield [int(size) for size in shape.replace(" ", "").split(",") if size]


@pytest.mark.parametrize("layers", [2, 5])
def test_two_graphs_at_any_depth_and_none_later(layers: int, tmp_path: Path) -> None:
    model = compiled("eager", layers=layers)
    before = graphs()
    step(model, tokens())
    assert graphs() - before == 2
    with model.disable_adapter(), torch.no_grad():
        model(tokens())
    model.save_pretrained(tmp_path)
    before = graphs()
    want = step(model, tokens())
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 5', '"lora_alpha": 9'))
    model.load_adapter(tmp_path)
    assert relative(step(model, tokens())["loss"], want["loss"]) > 1e-5
    with model.disable_adapter(), torch.no_grad():
        model(tokens())
    assert graphs() == before


def test_the_plan_counts_what_there_is() -> None:
    model = compiled(None)
    plan = model.lora_fx_plan
    assert plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain = lora_fx.plan(spec(adapter="rank = 3"), llama(2))
    outputs = sum(site.out_features for site in plan.sites)
    assert plan.trainable - plain.trainable == outputs > 0
    assert plan.memory()["adapters"] - plain.memory()["adapters"] == 4 * outputs


@pytest.mark.parametrize(
    "adapter", ["variant = dora", "variant = dora target o_proj { variant = lora }"]
)
def test_an_artifact(adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_program_each(monkeypatch)
    base = build(tmp_path / "artifact", artifact_text("", adapter=adapter))
    model = lora_fx.load(tmp_path / "artifact", base)
    want = lora_fx.compile(base, artifact_text("", adapter=adapter), backend=None)
    assert_equal(step(model, tokens()), step(want, tokens()))
