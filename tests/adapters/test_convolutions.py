"""Adapters on convolutions: what a dense weight computes in float64, and what PEFT does."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

import lora_fx
from tests.adapters.convolutions import (
    CASES,
    MERGED,
    PAIRS,
    SCALING,
    VARIANTS,
    Case,
    by_dense_weight,
    compiled,
    dense,
    state_of,
    step,
)
from tests.adapters.kinds import scatter
from tests.dense import relative

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
EACH = pytest.mark.parametrize(("name", "variant"), PAIRS)


def scaling_of(variant: str) -> float:
    return 3 / 2 if variant == "rslora" else SCALING


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert len(want) > 3
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape, name
        assert tensor.norm() > 0, name
        assert relative(got[name], tensor) < 1e-5, name


@EACH
def test_as_a_dense_weight(name: str, variant: str) -> None:
    case = CASES[name]
    model = compiled(case, VARIANTS[variant], None)
    got = step(model, case.x())
    assert_same(got, dense(case, state_of(model), scaling_of(variant)))
    with model.disable_adapter(), torch.no_grad():
        off = model(case.x())
    assert torch.equal(off, case.layer()(case.x()))
    assert relative(got["output"], off) > 1e-2


@EACH
def test_rewritten(name: str, variant: str) -> None:
    case = CASES[name]
    model, marked = (compiled(case, VARIANTS[variant], backend) for backend in ("eager", None))
    assert_same(step(model, case.x()), step(marked, case.x()))


COMPILED = [
    ("1d, same and reflect", "dora"),
    ("1d, groups", "lora_bias"),
    ("2d, circular", "dora"),
    ("2d, same, uneven", "rslora"),
    ("2d, without bias", "dora"),
    ("3d, line", "lora"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), COMPILED)
def test_compiled(name: str, variant: str) -> None:
    case = CASES[name]
    model, marked = (compiled(case, VARIANTS[variant], b) for b in ("inductor", None))
    assert_same(step(model, case.x()), step(marked, case.x()))


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", ["1d", "2d, circular", "2d, without bias", "3d, line"])
def test_dropout(name: str, variant: str) -> None:
    """One mask for the branch, and with DoRA for what it makes of the base's output too."""
    case = CASES[name]
    adapter = f"{VARIANTS[variant]} dropout = 0.4"
    model, marked = (compiled(case, adapter, backend).train() for backend in ("eager", None))
    got = step(model, case.x())
    assert_same(got, step(marked, case.x()))
    assert relative(got["output"], step(model.eval(), case.x())["output"]) > 1e-2
    model.train()
    torch.manual_seed(7)
    dropped = nn.functional.dropout(case.x(), 0.4)
    own = {key: tensor.double() for key, tensor in state_of(model).items()}
    base, kept = case.layer().double(), dropped.double()
    zero = {key: tensor * (0 if "_B" in key else 1) for key, tensor in own.items()}
    zero.pop("lora_magnitude_vector", None)
    branch = by_dense_weight(case, own, kept, SCALING) - by_dense_weight(case, zero, kept, SCALING)
    assert relative(got["output"], base(case.x().double()) + branch) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_by_finite_differences(variant: str) -> None:
    """DoRA's norms are constants, so that there only m is looked at."""
    case = CASES["1d, same and reflect"]
    model = compiled(case, VARIANTS[variant], None).double()
    names = ["lora_magnitude_vector"] if variant == "dora" else list(state_of(model))
    leaves = [state_of(model)[name] for name in names]

    def output(*values: Tensor) -> Tensor:
        params = dict(zip((id(leaf) for leaf in leaves), values, strict=True))
        named = {n: params.get(id(p), p) for n, p in model.named_parameters()}
        return torch.func.functional_call(model, named, (case.x().double(),))

    assert torch.autograd.gradcheck(output, leaves)


def peft_of(layer: nn.Module, **config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(layer, LoraConfig(target_modules=["0"], **config)).eval()


def by_peft(case: Case, model: nn.Module, **config: object) -> nn.Module:
    theirs = peft_of(case.layer(), r=4, lora_alpha=3, **config)
    named = {f"base_model.model.0.{name}": t for name, t in state_of(model).items()}
    assert not set_peft_model_state_dict(theirs, named).unexpected_keys
    return theirs


@pytest.mark.parametrize(("name", "variant"), [p for p in PAIRS if p[1] in ("lora", "dora")])
def test_as_peft(name: str, variant: str) -> None:
    """PEFT's branch is not dilated, and pads with zeros (huggingface/peft#3697)."""
    case = CASES[name]
    model = compiled(case, VARIANTS[variant], None)
    theirs = by_peft(case, model, use_dora=variant == "dora")
    got = step(model, case.x())["output"]
    if case.as_peft:
        assert relative(got, theirs(case.x())) < 1e-5
        return
    if "dilation" in case.settings and "same" not in case.settings.values():
        with pytest.raises(RuntimeError, match="must match the size"):
            theirs(case.x())
    else:
        assert relative(got, theirs(case.x())) > 1e-2


@pytest.mark.parametrize(
    ("name", "variant"), [(n, v) for n, v in PAIRS if n in MERGED and v != "bias"]
)
def test_merged_and_back(name: str, variant: str) -> None:
    case = CASES[name]
    base = case.layer()
    model = compiled(case, VARIANTS[variant], None, base)
    want, off = step(model, case.x())["output"], base(case.x())
    weight = model[0].weight
    model.merge_adapter()
    assert model[0].weight.shape == weight.shape
    assert relative(model(case.x()), want) < 1e-5
    assert relative(model(case.x()), off) > 1e-2
    model.unmerge_adapter()
    assert model[0].weight is weight
    assert torch.equal(step(model, case.x())["output"], want)
    plain = model.merge_and_unload()
    assert type(plain[0]) is case.kind
    assert relative(plain(case.x()), want) < 1e-5


def test_two_merged_in_one_pass() -> None:
    case = CASES["2d, circular"]
    text = """lora 1
    adapter one { rank = 2  alpha = 3  init = random  target class "Conv2d" }
    adapter two { rank = 3  alpha = 5  init = random  target class "Conv2d" }"""
    model = lora_fx.compile(case.layer(), text, backend=None)
    for name in ("one", "two"):
        scatter(model, name)
    model.set_adapter(["one", "two"])
    want = model(case.x())
    model.merge_adapter()
    assert relative(model(case.x()), want) < 1e-5
    model.unmerge_adapter()
    model.set_adapter("one")
    assert relative(model(case.x()), want) > 1e-2


@pytest.mark.parametrize("name", ["1d, groups", "2d, by channel"])
def test_no_grouped_weight_holds_the_adapter(name: str) -> None:
    model = compiled(CASES[name], "", None)
    before = model(CASES[name].x())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(lora_fx.LoraFxError, match=r"`0` has \d groups"):
            merge()
        assert torch.equal(model(CASES[name].x()), before)


@pytest.mark.parametrize("name", ["2d, circular", "1d, groups", "3d, one place"])
def test_one_sample_without_a_batch(name: str) -> None:
    case = CASES[name]
    for variant in ("lora", "dora") if case.groups == 1 else ("lora",):
        model = compiled(case, VARIANTS[variant], "eager")
        assert relative(model(case.x()[1]), model(case.x())[1]) < 1e-5


def test_two_adapters_read_the_input_once() -> None:
    case = CASES["2d, circular"]
    text = """lora 1
    adapter one { rank = 2  init = random  variant = dora  target class "Conv2d" }
    adapter two { rank = 3  init = random  variant = dora  target class "Conv2d" }"""
    models = [lora_fx.compile(case.layer(), text, backend=b) for b in ("eager", None)]
    for model in models:
        for name in ("one", "two"):
            scatter(model, name)
        model.set_adapter(["one", "two"])
    rewritten, marked = (model(case.x()) for model in models)
    assert relative(rewritten, marked) < 1e-6
    graph = lora_fx.capture(models[0], input=case.x()).text("fused")
    assert graph.count("lora_fx.convolve") == 1
    assert graph.count("vector_norm(") == 1


class Causal(nn.Conv1d):
    """Pads the past only, and then convolves."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (2, 0)))


class Standardised(nn.Conv1d):
    """Convolves with another weight than its own."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv1d(input, self.weight / self.weight.norm(), self.bias)


class AsTorch(nn.Conv1d):
    """Does so by torch's own method, which pads as the layer says."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight / self.weight.norm(), self.bias)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_layer_that_prepares_its_input(backend: str | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 11)
    text = """lora 1 adapter default { rank = 2  init = random  target class "Causal" }"""
    model = lora_fx.compile(nn.Sequential(Causal(5, 7, 3)), text, backend=backend)
    got = model(x)
    with model.disable_adapter():
        assert relative(got, model(x)) > 1e-2
    assert relative(model.merge_and_unload()(x), got) < 1e-5


@pytest.mark.parametrize("kind", [Standardised, AsTorch])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_layer_that_convolves_with_another_weight(
    kind: type[nn.Conv1d], backend: str | None
) -> None:
    text = f"""lora 1 adapter default {{
        rank = 2  init = random  target class "{kind.__name__}" }}"""
    model = lora_fx.compile(nn.Sequential(kind(5, 7, 3)), text, backend=backend)
    with pytest.raises(lora_fx.LoraFxError, match="reads its weight without calling it"):
        model(torch.randn(2, 5, 11))


@pytest.mark.parametrize("init", ["default", "gaussian", "random"])
@pytest.mark.parametrize("name", ["2d", "1d, groups", "3d, line"])
def test_it_starts_as_with_peft(name: str, init: str) -> None:
    """The same spread of A and B, in many draws."""
    case = CASES[name]
    target = f'target class "{case.kind.__name__}"'
    of_peft = {"default": True, "gaussian": "gaussian", "random": False}[init]
    drawn: dict[str, list[Tensor]] = {}
    for seed in range(40):
        text = f"lora 1 adapter default {{ rank = 4  init = {init}  seed = {seed}  {target} }}"
        model = lora_fx.compile(case.layer(), text, backend=None)
        if init != "random":
            assert torch.equal(model(case.x()), case.layer()(case.x()))
        layer = case.layer()
        torch.manual_seed(seed)
        theirs = dict(peft_of(layer, r=4, init_lora_weights=of_peft).named_parameters())
        for factor in ("lora_A", "lora_B"):
            own = state_of(model)[f"{factor}.weight"]
            other = theirs[f"base_model.model.0.{factor}.default.weight"]
            assert own.shape == other.shape
            drawn.setdefault(f"own {factor}", []).append(own.detach().flatten())
            drawn.setdefault(f"other {factor}", []).append(other.detach().flatten())
    for factor in ("lora_A", "lora_B"):
        own, other = (torch.cat(drawn[f"{whose} {factor}"]) for whose in ("own", "other"))
        assert own.any() == other.any()
        assert own.any() or (factor == "lora_B" and init != "random")
        assert own.std().item() == pytest.approx(other.std().item(), rel=0.1)
        assert own.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.35)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa(iterations = 4)"])
@pytest.mark.parametrize("name", ["1d, same and reflect", "2d, circular", "3d, line"])
def test_an_init_that_changes_the_weight(
    name: str, init: str, variant: str, tmp_path: Path
) -> None:
    """As of the matrix (out, in · k): the base's output at first, and off; files are plain LoRA."""
    case, base = CASES[name], CASES[name].layer()
    text = f"""lora 1 adapter default {{ rank = 2  init = {init}  variant = {variant}
        target class "{case.kind.__name__}" }}"""
    model = lora_fx.compile(base, text, backend="eager")
    x = case.x()
    assert relative(model(x), base(x)) < 1e-5
    assert relative(model[0].weight, base[0].weight) > 1e-2
    if init == "pissa" and variant == "lora":
        W = base[0].weight.detach().double().flatten(1)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        rest = (U[:, 2:] * S[2:]) @ Vh[2:]
        assert relative(model[0].weight.flatten(1), rest) < 1e-5
    scatter(model)
    want = model(x)
    assert relative(want, base(x)) > 1e-2
    with model.disable_adapter():
        assert relative(model(x), base(x)) < 1e-5
    model.save_adapters(tmp_path)
    again = lora_fx.load(tmp_path, base=case.layer(), backend=None)
    assert relative(again(x), want) < 1e-5
    if case.as_peft and variant == "lora":
        theirs = PeftModel.from_pretrained(case.layer(), tmp_path).eval()
        assert relative(theirs(x), want) < 1e-5
    plain = model.merge_and_unload()
    assert relative(plain(x), want) < 1e-5


def test_orthogonal_starts_as_the_base() -> None:
    case = CASES["2d, circular"]
    text = """lora 1 adapter default { rank = 4  init = orthogonal  target class "Conv2d" }"""
    model = lora_fx.compile(case.layer(), text, backend=None)
    assert relative(model(case.x()), case.layer()(case.x())) < 1e-6
    assert all(tensor.norm() > 0 for tensor in state_of(model).values())
    scatter(model)
    assert relative(model(case.x()), case.layer()(case.x())) > 1e-2
