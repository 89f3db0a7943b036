import pytest

from lora_fx import kernels


def test_kernels_are_for_gpus_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    assert kernels.are_on("cuda")
    assert not kernels.are_on("cpu")
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert not kernels.are_on("cuda")
