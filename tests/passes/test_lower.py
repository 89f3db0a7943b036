import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from lora_fx.graph.text import text
from lora_fx.graph.verify import verify
from lora_fx.passes.lower import lower
from lora_fx.rewrite.driver import apply
from lora_fx.rules.expand_sites import ExpandSites
from tests.captured import capture_module, run
from tests.dense import relative
from tests.marked import add_adapter


def model(dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=False, dtype=dtype))
    add_adapter(model[0], "default", 2, **settings)
    return model


def lowered(model: nn.Module, x: torch.Tensor):
    graph = capture_module(model, x)
    apply([ExpandSites()], graph)
    assert lower(graph) == 2
    verify(graph, "lowered", "lower")
    return graph


def test_text() -> None:
    assert_expected_inline(
        text(lowered(model(), torch.randn(4, 5))),
        """\
%l_args_0_: f32[4, 5] = input
%output: f32[4, 7] = linear(%l_args_0_, @0.weight, None)
%linear_1: f32[4, 2] = linear(%l_args_0_, @0.lora_A.default.weight)   # expand_sites/lower
%getitem: f32[] = getitem(@0.lora_scalings, 0)   # expand_sites/lower
%mul: f32[4, 2] = mul(%linear_1, %getitem)   # expand_sites/lower
%linear_2: f32[4, 7] = linear(%mul, @0.lora_B.default.weight)   # expand_sites/lower
%add: f32[4, 7] = add(%output, %linear_2)   # expand_sites/lower
return (%add)""",
    )


def test_text_with_dropout_in_bfloat16() -> None:
    graph = lowered(model(torch.bfloat16, dropout=0.1), torch.randn(4, 5, dtype=torch.bfloat16))
    assert_expected_inline(
        text(graph),
        """\
%l_args_0_: bf16[4, 5] = input
%output: bf16[4, 7] = linear(%l_args_0_, @0.weight, None)
%dropout: bf16[4, 5] = dropout(%l_args_0_, 0.1, True)   # expand_sites/lower
%to: bf16[2, 5] = .to(@0.lora_A.default.weight, torch.bfloat16)   # expand_sites/lower
%linear_1: bf16[4, 2] = linear(%dropout, %to)   # expand_sites/lower
%getitem: f32[] = getitem(@0.lora_scalings, 0)   # expand_sites/lower
%mul: f32[7, 2] = mul(@0.lora_B.default.weight, %getitem)   # expand_sites/lower
%to_1: bf16[7, 2] = .to(%mul, torch.bfloat16)   # expand_sites/lower
%linear_2: bf16[4, 7] = linear(%linear_1, %to_1)   # expand_sites/lower
%add: bf16[4, 7] = add(%output, %linear_2)   # expand_sites/lower
return (%add)""",
    )


@pytest.mark.parametrize("compute", ["activation", "float32", "float64"])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_computes_what_the_site_does(compute: str, autocast: bool) -> None:
    m = model(compute=compute)
    x = torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        graph = lowered(m, x)
        x = torch.randn(4, 5)
        got, want = run(graph, m, x), m(x)
        base = nn.functional.linear(x, m[0].weight)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    assert relative(base, want) > 0.1


def test_compute_is_precise_under_autocast() -> None:
    """Without autocast around the branch, its effect is exact to float32 rounding of the sum."""
    m = model(compute="float64", scaling=1e4)
    x = torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(lowered(m, x), m, x)
    A, B = m[0].lora_A["default"].weight.double(), m[0].lora_B["default"].weight.double()
    want = 1e4 * (x.double() @ A.T) @ B.T
    assert relative(got, want) < 4e-3
