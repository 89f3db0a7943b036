from collections.abc import Iterator

import pytest
import torch

from lora_fx.graph.exact import exact_products

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = [backend.fp32_precision for backend in BACKENDS]
    yield
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision


@pytest.mark.parametrize("allowed", [None, "tf32"])
def test_inside_it_is_float32_and_afterwards_as_before(allowed: str | None) -> None:
    if allowed:
        torch.backends.cuda.matmul.fp32_precision = allowed
    before = [backend.fp32_precision for backend in BACKENDS]
    with pytest.raises(ValueError), torch.autocast("cpu"), exact_products():  # noqa: PT011, PT012
        assert [backend.fp32_precision for backend in BACKENDS] == ["ieee", "ieee"]
        assert torch.ones(3, 5).mm(torch.ones(5, 7)).dtype is torch.float32
        raise ValueError
    assert [backend.fp32_precision for backend in BACKENDS] == before
    with torch.autocast("cpu"):
        assert torch.ones(3, 5).mm(torch.ones(5, 7)).dtype is torch.bfloat16
