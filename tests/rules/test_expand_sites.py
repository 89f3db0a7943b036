import torch
from expecttest import assert_expected_inline
from torch import nn

import lora_fx
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


def test_text_of_a_convolution_with_magnitudes() -> None:
    text_of = """lora 1 adapter dora { rank = 2  variant = dora  target class "Conv1d" }"""
    layer = nn.Sequential(nn.Conv1d(5, 7, 3, padding="same", padding_mode="circular"))
    compiled = lora_fx.compile(layer, text_of, backend="eager")
    graph = lora_fx.capture(compiled, input=torch.randn(4, 5, 11)).text("adapted")
    assert_expected_inline(
        graph,
        """\
%l_kwargs_input_: f32[4, 5, 11] = input
%pad: f32[4, 5, 13] = pad(%l_kwargs_input_, [1, 1], 'circular', None)
%output: f32[4, 7, 11] = conv1d(%pad, @0.weight, @0.bias, (1), (0), (1), 1)
%flatten: f32[7, 15] = flatten(@0.weight, 1)   # expand_sites | dora | <text>:1
%flatten_1: f32[2, 15] = flatten(@0.lora_A.dora.weight, 1)   # expand_sites | dora | <text>:1
%flatten_2: f32[7, 2] = flatten(@0.lora_B.dora.weight, 1)   # expand_sites | dora | <text>:1
%convolve_default: f32[4, 2, 11] = lora_fx.convolve(%l_kwargs_input_, @0.lora_A.dora.weight, 0.0, 'activation', '1:1+1:1:circular')   # expand_sites | dora | <text>:1
%expand_default: f32[4, 7, 11] = lora_fx.expand(%output, %convolve_default, @0.lora_B.dora.weight, @0.lora_scalings, 0, 'activation')   # expand_sites | dora | <text>:1
%norms_default: f32[7] = lora_fx.norms(%flatten, %flatten_1, %flatten_2, @0.lora_scalings, 0, 1.0)   # expand_sites | dora | <text>:1
%reshape: f32[7, 1] = reshape(@0.lora_magnitude_vector.dora.weight, (-1, 1))   # expand_sites | dora | <text>:1
%reshape_1: f32[7, 1] = reshape(%norms_default, (-1, 1))   # expand_sites | dora | <text>:1
%reshape_2: f32[7, 1] = reshape(@0.bias, (-1, 1))   # expand_sites | dora | <text>:1
%magnitude_default: f32[4, 7, 11] = lora_fx.magnitude(%expand_default, %expand_default, %reshape, %reshape_1, %reshape_2)   # expand_sites | dora | <text>:1
return (%magnitude_default)""",
    )
