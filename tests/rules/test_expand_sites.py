import torch
from expecttest import assert_expected_inline
from torch import nn

from lora_fx.graph.text import text
from lora_fx.rewrite.driver import apply, misses
from lora_fx.rules.expand_sites import ExpandSites
from tests.captured import capture_module, run
from tests.dense import adapted_linear, relative
from tests.marked import add_adapter


def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7))
    add_adapter(model[0], "sql", 2, scaling=0.5)
    add_adapter(model[0], "style", 3, scaling=-1.5)
    return model


def test_text() -> None:
    graph = capture_module(model(), torch.randn(4, 5))
    assert apply([ExpandSites()], graph) == {"expand_sites": 1}
    assert_expected_inline(
        text(graph),
        """\
%l_args_0_: f32[4, 5] = input
%output: f32[4, 7] = linear(%l_args_0_, @0.weight, @0.bias)
%shrink_default: f32[4, 2] = lora_fx.shrink(%l_args_0_, @0.lora_A.sql.weight, 0.0, 'activation')   # expand_sites
%expand_default: f32[4, 7] = lora_fx.expand(%output, %shrink_default, @0.lora_B.sql.weight, @0.lora_scalings, 0, 'activation')   # expand_sites
%shrink_default_1: f32[4, 3] = lora_fx.shrink(%l_args_0_, @0.lora_A.style.weight, 0.0, 'activation')   # expand_sites
%expand_default_1: f32[4, 7] = lora_fx.expand(%expand_default, %shrink_default_1, @0.lora_B.style.weight, @0.lora_scalings, 1, 'activation')   # expand_sites
return (%expand_default_1)""",
    )


def test_it_computes_the_dense_sum_on_new_inputs() -> None:
    m = model()
    graph = capture_module(m, torch.randn(4, 5))
    apply([ExpandSites()], graph)
    x = torch.randn(4, 5)
    site = m[0]
    branches = [
        (s, site.lora_A[n].weight, site.lora_B[n].weight)
        for n, s in (("sql", 0.5), ("style", -1.5))
    ]
    want = adapted_linear(x, site.weight, site.bias, branches)
    assert relative(run(graph, m, x), want) < 1e-6
    assert relative(nn.functional.linear(x, site.weight, site.bias), want) > 0.1


def test_other_nodes_are_missed_with_a_reason() -> None:
    graph = capture_module(nn.Sequential(nn.Linear(5, 7)), torch.randn(4, 5))
    assert apply([ExpandSites()], graph) == {}
    assert {reason for _, _, reason in misses([ExpandSites()], graph)} == {"not a site"}
