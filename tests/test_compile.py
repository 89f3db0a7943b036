"""The pipeline's results against the marked model and against dense float64."""

import pytest
import torch
from torch import nn

import lora_fx
from tests.dense import adapted_linear, relative
from tests.marked import Block
from tests.tiny import assert_differ, assert_equal, generate, graphs, llama, spec, step, tokens

TWO = """lora 1
adapter sql { rank = 3 alpha = 6 init = random target q_proj, v_proj, down_proj }
adapter style { rank = 2 alpha = 5 init = random scaling = rslora target linear in layers[1..] }
"""


@pytest.mark.parametrize("unit", ["layers", "model"])
def test_inductor_equals_the_marked_model(unit: str) -> None:
    base = llama(3)
    model = lora_fx.compile(base, spec(unit))
    marked = lora_fx.compile(base, spec(unit), backend=None)
    assert_equal(step(model, tokens()), step(marked, tokens()), 2e-5)
    assert torch.equal(generate(model.eval(), tokens()), generate(marked.eval(), tokens()))


def test_ranks_and_scalings_that_differ_by_layer() -> None:
    text = """lora 1
    adapter default {
      rank = if layer.index < 2 then 2 else 5
      alpha = 3 * rank
      init = random
      target linear
      target down_proj in layers[1..3] { scaling = rslora }
      target o_proj { scaling = 0.25 }
    }"""
    base = llama(4)
    model, marked = (lora_fx.compile(base, text, backend=b) for b in ("eager", None))
    ranks = [layer.self_attn.q_proj.lora_A["default"].out_features for layer in model.model.layers]
    assert ranks == [2, 2, 5, 5]
    assert_equal(step(model, tokens()), step(marked, tokens()))
    down = model.model.layers[2].mlp.down_proj
    assert down.lora_scalings.item() == pytest.approx(15 / 5**0.5)
    assert model.model.layers[2].self_attn.o_proj.lora_scalings.item() == 0.25


def test_several_active_adapters_add_up() -> None:
    base = llama(3).double()  # in float32 the sum of two random adapters amplifies rounding
    model, marked = (lora_fx.compile(base, TWO, backend=b) for b in ("eager", None))
    outputs = {}
    for active in ("sql", "style", ["sql", "style"], ["style", "sql"]):
        for m in (model, marked):
            m.set_adapter(active)
        got, want = step(model, tokens()), step(marked, tokens())
        assert_equal(got, want)
        outputs[str(active)] = model(tokens()).logits
    assert_differ([outputs["sql"]], [outputs["style"]])
    assert relative(outputs["['sql', 'style']"], outputs["['style', 'sql']"]) < 1e-5
    site = model.model.layers[1].self_attn.q_proj
    x = torch.randn(4, 32, dtype=torch.float64)
    branches = [
        (s, site.lora_A[n].weight, site.lora_B[n].weight)
        for n, s in (("sql", 6 / 3), ("style", 5 / 2**0.5))
    ]
    assert relative(site(x), adapted_linear(x, site.weight, None, branches)) < 1e-5


def test_dropout_only_while_training() -> None:
    text = spec(adapter="rank = 4 alpha = 6 dropout = 0.3")
    base = llama(3)
    model, marked = (lora_fx.compile(base, text, backend=b) for b in ("eager", None))
    plain = lora_fx.compile(base, spec(), backend=None)

    def seeded(m: nn.Module) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return step(m, tokens())

    assert_equal(seeded(model), seeded(marked))
    assert_differ(seeded(model).values(), seeded(plain).values())
    model.eval(), plain.eval()
    assert relative(model(tokens()).logits, plain(tokens()).logits) < 1e-6


def assert_as_precise(got: dict, want: dict, exact: dict) -> None:
    """Low precision: as near to float64 as the plain path is, which is not far."""
    for name, tensor in exact.items():
        plain = relative(want[name], tensor)
        assert plain < 0.2, name
        assert relative(got[name], tensor) < 1.5 * plain + 2e-3, name


@pytest.mark.parametrize("compute", ["activation", "float32"])
def test_autocast(compute: str) -> None:
    text = spec(adapter=f"rank = 4 alpha = 6 compute = {compute}")
    base = llama(3)
    model, marked = (lora_fx.compile(base, text, backend=b) for b in ("eager", None))
    exact = step(lora_fx.compile(base, text, backend=None).double(), tokens())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = step(model, tokens()), step(marked, tokens())
    assert_as_precise(got, want, exact)
    assert relative(got["loss"], step(model, tokens())["loss"]) > 0


def test_a_bfloat16_base_with_float32_adapters() -> None:
    base = llama(3).to(torch.bfloat16)
    text = spec(adapter="rank = 4 alpha = 6 seed = 2")  # some draws have gradients near zero
    model, marked = (lora_fx.compile(base, text, backend=b) for b in ("eager", None))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(tokens()).logits.dtype is torch.bfloat16
    exact = step(lora_fx.compile(base, text, backend=None).double(), tokens())
    assert_as_precise(step(model, tokens()), step(marked, tokens()), exact)


def test_dtype_of_the_adapter_parameters() -> None:
    model = lora_fx.compile(llama(), spec(adapter="rank = 4 dtype = bfloat16"), backend=None)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert model(tokens()).logits.dtype is torch.float32


def test_not_trainable() -> None:
    model = lora_fx.compile(llama(), spec(adapter="rank = 4 trainable = false"), backend=None)
    assert not any(p.requires_grad for p in model.parameters())


class Tower(nn.Module):
    """A model that transformers never saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(13, 5)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.leave = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + self.leave(block(x))
        return x


@pytest.mark.parametrize("settings", ["", "checkpoint = layers", "unit = model"])
def test_any_module(settings: str) -> None:
    text = f"""lora 1
    adapter default {{ rank = 2 init = random target up, down in layers[1..] target enter }}
    compile {{ {settings} }}"""
    base = Tower()
    model, marked = (lora_fx.compile(base, text, backend=b) for b in ("eager", None))
    x = torch.randn(6, 13)
    leaves = [[p for p in m.parameters() if p.requires_grad] for m in (model, marked)]
    got, want = (
        torch.autograd.grad(m(x).square().sum(), ps)
        for m, ps in zip((model, marked), leaves, strict=True)
    )
    assert len(want) == 2 * 7
    for a, b in zip(got, want, strict=True):
        assert b.norm() > 0
        assert relative(a, b) < 1e-5
    assert_differ([base(x)], [model(x)])
    with model.disable_adapter():
        assert relative(model(x), base(x)) < 1e-6


def test_everything_wrong_is_said_at_once_and_nothing_done() -> None:
    base = llama()
    classes = [type(m) for m in base.modules()]
    text = """lora 1
    adapter default { rank = 33 target q_proj, k_prj target "model.norm" }
    layers { replicate 0..9 }"""
    with pytest.raises(lora_fx.LoraFxError) as error:
        lora_fx.compile(base, text.replace("layers {", "# layers {"), backend=None)
    codes = {d.code for d in error.value.diagnostics}
    assert codes == {"rank-too-large", "unmatched-target", "unsupported-layer"}
    with pytest.raises(lora_fx.LoraFxError, match=r"the layers are 0\.\.2"):
        lora_fx.compile(base, text, backend=None, inplace=True)
    assert [type(m) for m in base.modules()] == classes
    assert len(base.model.layers) == 2
    assert all(p.requires_grad for p in base.parameters())


def test_a_model_without_repeated_layers_is_compiled_as_a_whole() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    text = 'lora 1\nadapter default { rank = 2 init = random target "0" target "2" }'
    before = graphs()
    model, marked = (lora_fx.compile(base, text, backend=b) for b in ("eager", None))
    x = torch.randn(4, 5)
    assert relative(model(x), marked(x)) < 1e-6
    assert graphs() - before == 1
    assert_differ([base(x)], [model(x)])
    with pytest.raises(lora_fx.LoraFxError, match="needs a model with repeated layers") as error:
        lora_fx.compile(base, f"{text}\ncompile {{ checkpoint = layers }}", backend=None)
    assert [d.code for d in error.value.diagnostics] == ["no-layers"]
