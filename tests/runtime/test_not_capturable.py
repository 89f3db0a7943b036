"""What cannot be captured is refused at the model's line, and still runs marked."""

import pytest
import torch
from torch import nn
from transformers.utils import logging

import lora_fx
from tests.dense import relative
from tests.odd_models import Branching, Failing

LOGGER = logging.get_logger("transformers.of_a_model")
SPEC = "lora 1 adapter default { rank = 2 init = random target up }"


@pytest.mark.parametrize(
    ("base", "line", "reason"),
    [
        (Branching(), "return 2 * y if y.sum() > 0 else y", "Data-dependent"),
        (Failing(), 'raise ValueError("one row at a time")', "one row at a time"),
    ],
    ids=["branching", "failing"],
)
def test_refused(base: nn.Module, line: str, reason: str) -> None:
    model = lora_fx.compile(base, SPEC, backend="eager")
    for _ in range(2):
        with pytest.raises(lora_fx.LoraFxError, match=reason) as caught:
            model(torch.ones(3, 5))
        (fault,) = caught.value.diagnostics
        assert (fault.code, fault.span.text) == ("not-capturable", line)
        assert type(base).__name__ in fault.message


def test_it_runs_marked() -> None:
    base = Branching()
    model = lora_fx.compile(base, SPEC, backend=None)
    for x in (torch.ones(3, 5), -torch.ones(3, 5)):
        assert relative(model(x), base(x)) > 1e-2
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))


class Telling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        LOGGER.warning_once("a word of warning")
        return self.up(x)


def test_what_transformers_logs_once_is_left_out() -> None:
    base = Telling()
    model = lora_fx.compile(base, SPEC, backend="eager")
    assert relative(model(torch.ones(3, 5)), base(torch.ones(3, 5))) > 1e-2
