import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx import GraphModule

import lora_fx
from lora_fx.graph import ops
from lora_fx.graph.text import text
from lora_fx.kernels.elementwise import MAX_RANK
from lora_fx.passes.join_deltas import join_deltas
from lora_fx.passes.merge_in_one_kernel import merge_in_one_kernel
from tests.dense import relative
from tests.passes.test_join_deltas import adapted
from tests.rules.test_expand_merges import KEYS, dense, inputs


def fused(kind: str, dtype: torch.dtype) -> GraphModule:
    graph = adapted(kind, dtype)
    join_deltas(graph)
    return graph


def test_text() -> None:
    graph = fused("transposed", torch.bfloat16)
    assert merge_in_one_kernel(graph) == 1
    assert_expected_inline(
        text(graph),
        """\
%w: bf16[5, 7] = input
%a0: f32[2, 5] = input
%b0: f32[7, 2] = input
%a1: f32[3, 5] = input
%b1: f32[7, 3] = input
%scalings: f32[2] = input
%getitem: f32[] = getitem(%scalings, 0)   # expand_merges
%getitem_1: f32[] = getitem(%scalings, 1)   # expand_merges
%mul: f32[7, 2] = mul(%b0, %getitem)   # join_deltas
%mul_1: f32[7, 3] = mul(%b1, %getitem_1)   # join_deltas
%cat: f32[5, 5] = cat([%a0, %a1])   # join_deltas
%cat_1: f32[7, 5] = cat([%mul, %mul_1], 1)   # join_deltas
%t: f32[5, 5] = .t(%cat)
%t_1: f32[5, 7] = .t(%cat_1)
%elementwise_default = lora_fx.elementwise([%w], %t, %t_1, 'return x0')
%getitem_2: bf16[5, 7] = getitem(%elementwise_default, 0)
return %getitem_2""",
    )
    assert merge_in_one_kernel(graph) == 0


def test_it_is_the_dense_sum() -> None:
    for kind in KEYS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = inputs(kind, dtype)
            graph = fused(kind, dtype)
            assert merge_in_one_kernel(graph) == 1
            assert not [node for node in graph.graph.nodes if node.target is ops.delta]
            got, want = graph(*given), dense(*given).to(dtype)
            assert got.dtype == dtype
            assert relative(got, want) <= {4: 2e-7, 2: 0}[dtype.itemsize]
            assert relative(given[0], want) > 0.1


def test_what_is_added_in_float64_stays() -> None:
    graph = fused("linear", torch.float64)
    assert merge_in_one_kernel(graph) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(3, 5), (16, 48), (40, MAX_RANK)])
def test_on_a_gpu(dtype: torch.dtype, ranks: tuple[int, int]) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(515, 1030), nn.Linear(1030, 77, bias=False)).to(dtype)
    adapters = [f"adapter a{r} {{ rank = {r}  init = random  target linear }}" for r in ranks]
    model = lora_fx.compile(base, "lora 1\n" + "\n".join(adapters), backend=None).cuda()
    factors = {name: p.double() for name, p in model.named_parameters() if "lora_" in name}

    def delta(i: int, r: int) -> Tensor:
        return factors[f"{i}.lora_B.a{r}.weight"] @ factors[f"{i}.lora_A.a{r}.weight"]

    model.merge_adapter([f"a{r}" for r in ranks])
    for i, layer in enumerate(base):
        before = layer.weight.detach().cuda()
        want = before.double() + sum(scaling_of(model, r) * delta(i, r) for r in ranks)
        got = dict(model.named_parameters())[f"{i}.weight"]
        assert relative(got, want) <= 1.01 * relative(want.to(dtype), want) + 3e-7
        assert relative(before, want) > 0.1
    model.unmerge_adapter()
    for i, layer in enumerate(base):
        assert torch.equal(dict(model.named_parameters())[f"{i}.weight"], layer.weight.cuda())


def scaling_of(model: nn.Module, rank: int) -> float:
    (value,) = {
        site.lora_arithmetic[f"a{rank}"].scaling
        for site in model.modules()
        if hasattr(site, "lora_arithmetic")
    }
    return value
