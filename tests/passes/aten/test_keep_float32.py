"""A product that is cast to float32 is computed in it, on a GPU."""

import pytest
import torch

from lora_fx.passes.aten.keep_float32 import keep_float32
from tests.passes.aten.on_gpu import cast, operators, rewritten, traced


def widened(a, b):
    return cast(torch.mm(a, b), torch.float32)


def read_twice(a, b):
    product = torch.mm(a, b)
    return cast(product, torch.float32), product


def to_double(a, b):
    return cast(torch.mm(a, b), torch.float64)


GIVEN = [torch.randn(3, 5).bfloat16(), torch.randn(5, 7).bfloat16()]


def test_the_product_writes_float32() -> None:
    graph = rewritten(keep_float32, traced(widened, *GIVEN, device="cuda"))
    assert operators(graph) == ["mm.dtype"]
    (call,) = (node for node in graph.graph.nodes if node.op == "call_function")
    assert call.args[2] == call.meta["val"].dtype == torch.float32
    assert call.meta["val"].shape == (3, 7)


@pytest.mark.parametrize(
    ("function", "device", "dtype"),
    [
        (read_twice, "cuda", torch.bfloat16),
        (to_double, "cuda", torch.bfloat16),
        (widened, "cpu", torch.bfloat16),
        (widened, "cuda", torch.float32),
    ],
)
def test_what_is_left_alone(function, device: str, dtype: torch.dtype) -> None:
    given = [i.to(dtype) for i in GIVEN]
    rewritten(keep_float32, traced(function, *given, device=device), made=0)
