"""Weights that are merged in one launch, beside the dense sums and the programs of each site."""

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.adapters import storage
from lora_fx.kernels import merged_weights as kernel
from lora_fx.kernels.merged_weights import Product, Sum, is_in_kernel, merged_weights
from lora_fx.runtime.merging.run import run
from lora_fx.runtime.merging.together import run_together
from tests.dense import relative

SHAPES = (600, 257), (70, 384), (33, 1100)
DTYPES = torch.float32, torch.bfloat16, torch.float16


def sums(ranks: tuple[int, ...], dtype: torch.dtype, turned: bool, device: str) -> list[Sum]:
    """Return one sum for each shape; weights are parts of wider ones."""
    torch.manual_seed(sum(ranks))
    found = []
    for m, n in SHAPES:
        weight = torch.randn(m, n + 8, device=device).to(dtype)[:, :n]
        products = []
        for place, r in enumerate(ranks):
            P, Q = torch.randn(m, r, device=device), torch.randn(r, n, device=device)
            if turned:
                P, Q = P.t().contiguous().t(), Q.t().contiguous().t()
            products.append(Product(P, Q, 0.3 - place))
        found.append(Sum(weight, products))
    return found


def compare(of: list[Sum], into: list[Tensor]) -> None:
    for (weight, products), got in zip(of, into, strict=True):
        want = weight.double() + sum(s * P.double() @ Q.double() for P, Q, s in products)
        rounded = relative(want.to(got.dtype), want)
        assert relative(got, want) < 1.01 * rounded + 3e-7
        assert relative(weight, want) > 0.1


class Sharded(Tensor):
    """A tensor of another class, as FSDP's are."""


class Stack(nn.Module):
    """Three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 40, 24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


def model_of_every_kind(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    base = nn.ModuleDict(
        {
            "turned": Conv1D(24, 40),
            "linear": nn.Linear(24, 70),
            "embedding": nn.Embedding(90, 24),
            "conv": nn.Conv2d(6, 10, 3),
            "stack": Stack(),
        }
    ).to(dtype)
    adapters = [
        f"adapter {name} {{ rank = {rank} {more} target linear, embedding, conv {stack} }}"
        for name, rank, more, stack in (
            ("a", 3, "init = random alpha = 5", 'target parameter "stack.weight"'),
            ("b", 4, "init = random", ""),
        )
    ]
    return lora_fx.compile(base, "lora 1\n" + "\n".join(adapters), backend=None)


def compare_model(model: Any, adapters: tuple[str, ...], precise: float) -> None:
    """Compare with the program of each site, which other tests compare with PEFT."""
    sites = [site for _, site in storage.sites(model)]
    assert {site.lora_kind for site in sites} == {"linear", "embedding", "conv", "parameter"}
    found = dict(run_together(sites, adapters))
    assert len(found) == len(sites) == 5
    for site, tensors in found.items():
        ((name, want),) = run(site, adapters).items()
        assert tensors.keys() == {name}
        assert tensors[name].shape == site.weight.shape
        assert tensors[name].dtype == want.dtype
        assert relative(tensors[name], want) <= precise
        assert relative(site.weight, want) > 0.1


def test_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    of = sums((3, 5), torch.bfloat16, turned=False, device="cpu")[0]
    assert not is_in_kernel(of)
    monkeypatch.setattr(kernel, "DEVICE", "cpu")
    assert is_in_kernel(of)
    (P, Q, s), other = of.products
    assert is_in_kernel(Sum(nn.Parameter(of.weight), of.products))
    assert not is_in_kernel(Sum(of.weight.as_subclass(Sharded), of.products))
    for weight, products in (
        (of.weight.double(), of.products),
        (of.weight.t(), [Product(Q.t(), P.t(), s)]),
        (of.weight, [Product(P.double(), Q, s)]),
        (of.weight, [Product(P.bfloat16(), Q.bfloat16(), s), other]),
        (of.weight, [Product(P.to("meta"), Q, s)]),
        (of.weight, [Product(P.repeat(1, 20), Q.repeat(20, 1), s), other]),
        (of.weight[:0], [Product(P[:0], Q, s)]),
    ):
        assert not is_in_kernel(Sum(weight, products))


def test_without_a_gpu_programs_merge() -> None:
    compare_model(model_of_every_kind(), ("a",), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(3,), (16,), (3, 5, 8), (16, 48)])
@pytest.mark.parametrize("turned", [False, True])
def test_on_a_gpu(dtype: torch.dtype, ranks: tuple[int, ...], turned: bool) -> None:
    of = sums(ranks, dtype, turned, "cuda")
    assert all(map(is_in_kernel, of))
    into = [torch.full_like(one.weight, float("nan")).contiguous() for one in of]
    merged_weights(of, into)
    compare(of, into)


@pytest.mark.gpu
@pytest.mark.parametrize("adapters", [("a",), ("b", "a")])
def test_every_kind_on_a_gpu(adapters: tuple[str, ...]) -> None:
    compare_model(model_of_every_kind().cuda(), adapters, 3e-7)
    model = model_of_every_kind(torch.bfloat16).cuda()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.merge_adapter(list(adapters))
    assert relative(model["linear"].weight, before["linear.weight"]) > 0.1
    model.unmerge_adapter()
    assert torch.equal(model["linear"].weight, before["linear.weight"])


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernel_under_the_interpreter() -> None:
    """In a process of its own, since Triton asks once."""
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__], env=interpreted, check=True)


def _interpreted() -> None:
    from lora_fx.kernels import merged_weights_triton as compiled

    kernel.DEVICE = "cpu"
    compiled.launch = partial(compiled.launch, precision="ieee")  # type: ignore[assignment]
    for dtype in (torch.float32, torch.float16):
        for ranks in ((3,), (3, 5, 8), (16, 48)):
            for turned in (False, True):
                of = sums(ranks, dtype, turned, "cpu")
                assert all(map(is_in_kernel, of))
                into = [torch.full_like(one.weight, float("nan")).contiguous() for one in of]
                merged_weights(of, into)
                compare(of, into)
    for adapters in (("a",), ("b", "a")):
        compare_model(model_of_every_kind(), adapters, 3e-7)


if __name__ == "__main__":
    _interpreted()
