"""Target and rank patterns select the same modules in PEFT, whatever the modules are called."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

import lora_fx
from tests.dense import relative


class Nested(nn.Module):
    """The name of one linear is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(5, 7)
        self.inner = nn.ModuleDict({"proj": nn.Linear(7, 11), "other": nn.Linear(11, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["other"](self.inner["proj"](self.proj(x)))


@pytest.mark.parametrize(
    ("targets", "names", "ranks"),
    [
        ("target proj", ["proj"], {}),
        ('target "inner.proj"', ["inner.proj"], {}),
        ('target proj except "inner.*"', "proj", {}),
        ('target linear target "inner.proj" { rank = 3 }', ["other", "proj"], {"inner.proj": 3}),
        (
            'target linear { rank = 3 } target "proj" { rank = 4 }',
            ["other", "proj"],
            {"^proj": 4},
        ),
    ],
)
def test_names_that_end_in_another(
    targets: str, names: list[str] | str, ranks: dict[str, int], tmp_path: Path
) -> None:
    text = f"lora 1\nadapter default {{ rank = 2 init = random {targets} }}"
    model = lora_fx.compile(Nested(), text, backend=None)
    model.save_adapters(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["target_modules"], config["rank_pattern"]) == (names, ranks)
    x = torch.randn(13, 5)
    assert relative(model(x), Nested()(x)) > 1e-2
    assert relative(PeftModel.from_pretrained(Nested(), tmp_path)(x), model(x)) <= 1e-5
    assert relative(lora_fx.load(tmp_path, Nested(), backend=None)(x), model(x)) <= 1e-5
