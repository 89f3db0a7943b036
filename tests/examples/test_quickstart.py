from pathlib import Path

import pytest
import quickstart
from safetensors import safe_open

import lora_fx

pytestmark = pytest.mark.real


def test_the_plan_covers_every_linear_layer(smollm2: Path) -> None:
    plan = lora_fx.plan(lora_fx.parse(quickstart.SPEC), smollm2)
    per_layer = 16 * sum(
        n_in + n_out
        for n_in, n_out in [(576, 576), (576, 192)] * 2 + [(576, 1536)] * 3  # q, k, v, o, MLP
    )
    assert len(plan.sites) == 30 * 7
    assert plan.trainable == 30 * per_layer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # by Inductor
def test_the_whole_job(smollm2: Path, tmp_path: Path) -> None:
    outcome = quickstart.main(steps=8, held_out_blocks=4, out=tmp_path)
    assert outcome.after < outcome.before - 0.1
    assert outcome.reloaded == pytest.approx(outcome.after, rel=1e-5)
    assert outcome.base_text.strip()
    assert outcome.adapted_text.strip()
    assert outcome.adapted_text != outcome.base_text
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 30 * 7 * 2
