"""Weights that are merged some rows at a time, beside those merged as a whole."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fx.adapters import storage
from lora_fx.adapters.sites.site import Site
from lora_fx.runtime.merging import run as merging
from lora_fx.runtime.merging.run import has_rows, run, run_rows
from tests.dense import relative
from tests.kernels.test_merged_weights import model_of_every_kind


def sites(dtype: torch.dtype = torch.float32) -> list[Site]:
    model: Any = model_of_every_kind(dtype)
    return [site for _, site in storage.sites(model)]


@pytest.mark.parametrize("adapters", [("a",), ("b", "a")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_weight_is_merged_by_rows(
    adapters: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = sites(dtype)
    whole = [run(site, adapters) for site in of]
    programs: list[int] = []
    program = merging._program
    monkeypatch.setattr(merging, "_LARGE", 0)
    monkeypatch.setattr(merging, "_AT_ONCE", 24 * 9)
    monkeypatch.setattr(merging, "_program", lambda one: programs.append(1) or program(one))
    for site, tensors in zip(of, whole, strict=True):
        programs.clear()
        before = site.weight.clone()
        for name, tensor in run(site, adapters).items():
            assert relative(tensor, tensors[name]) < (1e-6 if dtype == torch.float32 else 1e-3)
            assert relative(site.weight, tensors[name]) > 0.1
        assert torch.equal(site.weight, before)
        if site.lora_kind == "linear":
            assert len(programs) == {40: 5, 70: 8}[len(site.weight)]


def test_rows_by_themselves() -> None:
    alone = [site for site in sites() if has_rows(site, "a")]
    assert [site.lora_turned for site in alone] == [True, False]
    for site in alone:
        want, parts = run(site, ("a",))["weight"], []
        for start in range(0, len(want), 10):
            rows: Tensor = site.weight.detach()[start : start + 10].clone()
            parts.append(run_rows(site, ("a",), rows, start))
        assert relative(torch.cat(parts), want) < 1e-6
        assert relative(torch.cat(parts).roll(10, 0), want) > 0.1
