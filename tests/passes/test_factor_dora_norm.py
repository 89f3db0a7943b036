import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.fx import GraphModule

from lora_fx import kernels
from lora_fx.graph.text import text
from lora_fx.graph.verify import InvalidGraph, verify
from lora_fx.kernels.row_squares import MAX_RANK
from lora_fx.passes.factor_dora_norm import factor_dora_norm
from lora_fx.passes.lower import lower
from lora_fx.rewrite.driver import apply
from lora_fx.rules.expand_sites import ExpandSites
from tests.captured import capture_module, run
from tests.dense import relative
from tests.marked import add_adapter


def model(*adapters: str, **settings: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7))
    for rank, name in enumerate(adapters, 2):
        add_adapter(model[0], name, rank, scaling=0.5 - rank, magnitude=True, **settings)
    return model


def adapted(module: nn.Module, *inputs: torch.Tensor) -> GraphModule:
    graph = capture_module(module, *inputs)
    apply([ExpandSites()], graph)
    return graph


def test_text() -> None:
    graph = adapted(model("sql"), torch.randn(4, 5))
    assert_expected_inline(
        text(graph),
        """\
%l_args_0_: f32[4, 5] = input
%output: f32[4, 7] = linear(%l_args_0_, @0.weight, @0.bias)
%shrink_default: f32[4, 2] = lora_fx.shrink(%l_args_0_, @0.lora_A.sql.weight, 0.0, 'activation')   # expand_sites
%expand_default: f32[4, 7] = lora_fx.expand(%output, %shrink_default, @0.lora_B.sql.weight, @0.lora_scalings, 0, 'activation')   # expand_sites
%norms_default: f32[7] = lora_fx.norms(@0.weight, @0.lora_A.sql.weight, @0.lora_B.sql.weight, @0.lora_scalings, 0, 1.0)   # expand_sites
%magnitude_default: f32[4, 7] = lora_fx.magnitude(%expand_default, %expand_default, @0.lora_magnitude_vector.sql.weight, %norms_default, @0.bias)   # expand_sites
return (%magnitude_default)""",
    )
    with pytest.raises(InvalidGraph, match=r"`lora_fx::norms` is not legal here"):
        verify(graph, "fused", "nothing")
    assert factor_dora_norm(graph) == 1
    verify(graph, "fused", "factor_dora_norm")
    assert_expected_inline(
        text(graph),
        """\
%l_args_0_: f32[4, 5] = input
%output: f32[4, 7] = linear(%l_args_0_, @0.weight, @0.bias)
%shrink_default: f32[4, 2] = lora_fx.shrink(%l_args_0_, @0.lora_A.sql.weight, 0.0, 'activation')   # expand_sites
%expand_default: f32[4, 7] = lora_fx.expand(%output, %shrink_default, @0.lora_B.sql.weight, @0.lora_scalings, 0, 'activation')   # expand_sites
%detach: f32[2, 5] = .detach(@0.lora_A.sql.weight)   # factor_dora_norm
%detach_1: f32[7, 5] = .detach(@0.weight)   # factor_dora_norm
%linalg_vector_norm: f32[7] = linalg_vector_norm(%detach_1, 2, 1, dtype=torch.float32)   # factor_dora_norm
%t: f32[5, 2] = .t(%detach)   # factor_dora_norm
%mm: f32[7, 2] = mm(%detach_1, %t)   # factor_dora_norm
%square: f32[7] = square(%linalg_vector_norm)   # factor_dora_norm
%detach_2: f32[7, 2] = .detach(@0.lora_B.sql.weight)   # factor_dora_norm
%select: f32[] = select(@0.lora_scalings, 0, 0)   # factor_dora_norm
%t_1: f32[5, 2] = .t(%detach)   # factor_dora_norm
%mm_1: f32[2, 2] = mm(%detach, %t_1)   # factor_dora_norm
%mm_2: f32[7, 2] = mm(%detach_2, %mm_1)   # factor_dora_norm
%mul: f32[7, 2] = mul(%select, %mm_2)   # factor_dora_norm
%mul_1: f32[7, 2] = mul(%mm, 2)   # factor_dora_norm
%add: f32[7, 2] = add(%mul_1, %mul)   # factor_dora_norm
%mul_2: f32[7, 2] = mul(%detach_2, %add)   # factor_dora_norm
%sum_1: f32[7] = sum(%mul_2, 1)   # factor_dora_norm
%mul_3: f32[7] = mul(%select, %sum_1)   # factor_dora_norm
%add_1: f32[7] = add(%square, %mul_3)   # factor_dora_norm
%clamp_min: f32[7] = clamp_min(%add_1, 1.1754943508222875e-38)   # factor_dora_norm
%sqrt: f32[7] = sqrt(%clamp_min)   # factor_dora_norm
%magnitude_default: f32[4, 7] = lora_fx.magnitude(%expand_default, %expand_default, @0.lora_magnitude_vector.sql.weight, %sqrt, @0.bias)   # expand_sites
return (%magnitude_default)""",
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("adapters", [("sql",), ("sql", "style")])
def test_it_computes_the_same(adapters: tuple[str, ...], dropout: float) -> None:
    m = model(*adapters, dropout=dropout)
    graph = adapted(m, torch.randn(4, 5))
    assert factor_dora_norm(graph) == 1
    x = torch.randn(4, 5)
    torch.manual_seed(1)
    want = m(x)
    torch.manual_seed(1)
    assert relative(run(graph, m, x), want) < 1e-6
    assert relative(nn.functional.linear(x, m[0].weight, m[0].bias), want) > 0.1


def test_a_weight_is_read_once_for_all_adapters() -> None:
    graph = adapted(model("sql", "style", "facts"), torch.randn(4, 5))
    factor_dora_norm(graph)
    (weight,) = (n for n in graph.graph.nodes if n.meta.get("lora_fx_fqn") == "0.weight")
    (detached,) = (user for user in weight.users if user.target == "detach")
    assert [str(user.name) for user in detached.users] == ["linalg_vector_norm", "mm"]


def test_in_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "are_on", lambda device: device == "cpu")
    m, x = model("sql"), torch.randn(4, 5, dtype=torch.bfloat16)
    m[0].bfloat16()
    graph = adapted(m, x)
    factor_dora_norm(graph)
    verify(graph, "fused", "factor_dora_norm")
    lines = [line for line in text(graph).splitlines() if line.endswith("# factor_dora_norm")]
    assert_expected_inline(
        "\n".join(lines),
        """\
%select: f32[] = select(@0.lora_scalings, 0, 0)   # factor_dora_norm
%detach: bf16[7, 5] = .detach(@0.weight)   # factor_dora_norm
%detach_1: bf16[2, 5] = .detach(@0.lora_A.sql.weight)   # factor_dora_norm
%detach_2: bf16[7, 2] = .detach(@0.lora_B.sql.weight)   # factor_dora_norm
%row_squares_default: f32[1, 7] = lora_fx.row_squares(%detach, %detach_1, %detach_2, %select)   # factor_dora_norm
%sum_1: f32[7] = sum(%row_squares_default, 0)   # factor_dora_norm
%clamp_min: f32[7] = clamp_min(%sum_1, 1.1754943508222875e-38)   # factor_dora_norm
%sqrt: f32[7] = sqrt(%clamp_min)   # factor_dora_norm""",
    )
    assert relative(run(graph, m, x), m(x)) < 0.01
    lower(graph)
    verify(graph, "lowered", "lower")
    assert "lora_fx.gain(@0.lora_magnitude_vector.sql.weight, %sqrt)" in text(graph)
    assert relative(run(graph, m, x), m(x)) < 0.01
    high = nn.Sequential(nn.Linear(5, 7)).bfloat16()
    add_adapter(high[0], "high", MAX_RANK + 1, magnitude=True)
    graph = adapted(high, x)
    factor_dora_norm(graph)
    assert "row_squares" not in text(graph)
    graph = adapted(model("sql", "style").bfloat16(), x)
    factor_dora_norm(graph)
    assert "row_squares" not in text(graph)
    graph = adapted(model("sql"), x.float())
    factor_dora_norm(graph)
    assert "row_squares" not in text(graph)


def test_without_autocast() -> None:
    m, x = model("sql"), torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = adapted(m, x)
        factor_dora_norm(graph)
        norms = next(n for n in graph.graph.nodes if n.name.startswith("sqrt"))
        assert norms.meta["example_value"].dtype is torch.float32
        got = run(graph, m, x)
        assert torch.equal(got, m(x))
    assert relative(got, m(x)) > 1e-4
