"""What dropout keeps, beside what chance would."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lora_fx.kernels import kept as drawn
from lora_fx.kernels.kept import kept, least_kept, stretch

ROWS, COLUMNS = 1024, 1100


def normal(seed: int, p: float, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """What is kept, shifted and scaled to mean 0 and variance 1."""
    return (kept(torch.tensor(seed), rows, columns, p).double() - (1 - p)) / (p * (1 - p)) ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, -5, 1 << 40])
def test_it_looks_like_chance(p: float, seed: int) -> None:
    x = normal(seed, p)
    assert abs(x.mean()) < 4 / x.numel() ** 0.5
    for along in (0, 1):
        assert abs(x.mean(along).std() * x.shape[along] ** 0.5 - 1) < 0.1
    for columns in (1, 2, 3, 4, 8, 16, 64, 512):
        beside = (x[:, columns:] * x[:, :-columns]).mean(1) * (COLUMNS - columns) ** 0.5
        assert abs(beside.square().mean() - 1) < 0.2  # of each row
        assert abs(beside.mean()) < 5 / ROWS**0.5
        across = x[: ROWS - 2, columns:] * x[2:, :-columns]
        assert abs(across.mean()) < 5 / across.numel() ** 0.5
        four = across * x[: ROWS - 2, :-columns] * x[2:, columns:]
        assert abs(four.mean()) < 5 / four.numel() ** 0.5
    spectrum = torch.fft.rfft(x, dim=1).abs().square()[:, 1:-1] / COLUMNS
    assert abs(spectrum.max(1).values.mean() - (0.577 + torch.log(torch.tensor(COLUMNS / 2)))) < 0.3
    assert torch.linalg.matrix_norm(x, 2) < 1.03 * (ROWS**0.5 + COLUMNS**0.5)


def test_without_its_first_multiplication_it_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "_mixed", lambda x: (x * drawn.SECOND) & 0xFFFFFFFF)
    with pytest.raises(AssertionError):
        test_it_looks_like_chance(0.5, 0)


def test_seeds_are_independent() -> None:
    one = normal(1, 0.5)
    for seed in (0, 2, -1, 1 + (1 << 32), 1 << 40):
        other = normal(seed, 0.5)
        assert abs((one * other).mean()) < 5 / one.numel() ** 0.5
        assert abs((one[1:] * other[:-1]).mean()) < 5 / one.numel() ** 0.5


def test_a_part_is_drawn_as_in_the_whole() -> None:
    assert torch.equal(normal(7, 0.5)[:100, :77], normal(7, 0.5, 100, 77))


def test_bits() -> None:
    """What was drawn once is drawn again, by any version: seeds are kept in caches of code."""
    seed = torch.tensor(0x0123456789ABCDEF)
    rows = ["".join("01"[int(one)] for one in row) for row in kept(seed, 3, 40, 0.3)]
    assert_expected_inline(
        "\n".join(rows),
        """\
1101100111111111111110110001110111111101
1011111011101111101101110001101011010111
0111111110110111110111010111111111110110""",
    )


def test_the_extremes() -> None:
    assert least_kept(0.0) == 0
    assert stretch(0.0) == 1
    assert least_kept(1 - 1e-12) == (1 << 32) - 1
    assert stretch(0.25) == 4 / 3
