from memory import bytes_of
from torch import nn


def test_shared_storage_counts_once() -> None:
    layer = nn.Linear(5, 7)
    tied = nn.Linear(5, 7, bias=False)
    tied.weight = nn.Parameter(layer.weight.detach())
    assert bytes_of(layer) == 4 * (5 * 7 + 7)
    assert bytes_of(layer, tied) == bytes_of(layer)
    assert bytes_of(layer, nn.Linear(5, 7)) == 2 * bytes_of(layer)
