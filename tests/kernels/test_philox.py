"""What dropout keeps, beside Random123's vectors and what chance has to look like."""

import pytest
import torch

from lora_fx.kernels import philox
from lora_fx.kernels.philox import gain, kept, least_kept


def test_words_are_those_of_random123(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kat_vectors: philox4x32 of zeros, and of ones, by 7 and 10 rounds."""
    zero, ones = torch.tensor(0), torch.tensor((1 << 32) - 1)
    words = philox._philox(zero, zero, zero)
    assert [f"{int(word):08x}" for word in words] == [
        "5f6fb709",
        "0d893f64",
        "4f121f81",
        "4f730a48",
    ]
    monkeypatch.setattr(philox, "ROUNDS", 10)
    words = philox._philox(zero, zero, zero)
    assert [f"{int(word):08x}" for word in words] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]
    assert int(philox._wide(ones, (1 << 32) - 1)[1]) == (1 << 32) - 2


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_as_many_are_kept_as_said(p: float) -> None:
    mask = kept(torch.tensor(-5), 1024, 1001, p).double()
    error = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * error
    assert abs(mask.mean() * gain(p) - 1) < 4 * error / (1 - p)
    for along in (0, 1):
        means = mask.mean(along)
        assert abs(means.std() / (p * (1 - p) / mask.shape[along]) ** 0.5 - 1) < 0.1


def test_neighbours_rows_and_seeds_are_independent() -> None:
    masks = [kept(torch.tensor(seed), 512, 512, 0.5).double() - 0.5 for seed in (1, 2, 1 << 40)]
    one = masks[0]
    others = [one.roll(by, along) for along in (0, 1) for by in (1, 2, 4, 8, 64)] + masks[1:]
    for other in others:
        assert abs((one * other).mean() * 4) < 5 / 512
    assert torch.equal(one, kept(torch.tensor(1), 512, 512, 0.5).double() - 0.5)
    assert torch.equal(one[:100, :77] + 0.5, kept(torch.tensor(1), 100, 77, 0.5).double())


def test_the_extremes() -> None:
    assert least_kept(0.0) == 0
    assert gain(0.0) == 1
    assert least_kept(1 - 1e-9) == 65535
    assert gain(0.25) == 4 / 3
