"""Which way a mixed batch is computed."""

import pytest

from lora_fx.rules.dispatch_costs import is_gathered


@pytest.mark.parametrize(
    ("samples", "rows", "adapters", "gathered"),
    [
        (8, 128, 64, True),
        (8, 128, 2, True),
        (8, 1, 64, True),
        (32, 1, 64, True),
        (32, 1, 2, False),
        (32, 16, 1, False),
    ],
)
def test_on_a_cpu(samples: int, rows: int, adapters: int, gathered: bool) -> None:
    assert is_gathered("cpu", samples, rows, [16] * adapters, 1) is gathered


@pytest.mark.parametrize(
    ("samples", "rows", "adapters", "gathered"),
    [
        (64, 128, 64, True),
        (64, 128, 2, False),
        (8, 1024, 8, False),
        (64, 1, 64, False),
        (32, 1, 8, False),
    ],
)
def test_on_cuda_as_its_numbers_say(samples: int, rows: int, adapters: int, gathered: bool) -> None:
    assert is_gathered("cuda", samples, rows, [16] * adapters, 1) is gathered


def test_mixes_and_one_wide_adapter_make_it_dearer() -> None:
    ranks = [8] * 4
    assert is_gathered("cpu", 8, 64, ranks, 1)
    assert not is_gathered("cpu", 8, 64, ranks, 4)
    assert not is_gathered("cpu", 8, 64, [*ranks, 64], 1)


def test_an_unknown_device_computes_all() -> None:
    assert not is_gathered("mps", 64, 128, [16] * 64, 1)
