"""Each kind of layer on a small module of all kinds: rewritten it is what it is marked."""

from pathlib import Path

import pytest
from torch import Tensor

import lora_fx
from tests.adapters.kinds import scatter
from tests.adapters.varied import IDS, KINDS, assert_same, compiled, step
from tests.dense import relative
from tests.odd_models import Varied

TWO = """lora 1
adapter one { rank = 2  init = random  bias = lora_only  target mix, embed  tokens [3] in embed }
adapter two { rank = 3  init = random  target mix, up, embed  train norm  tokens [9, 1] in embed }
"""


@pytest.mark.parametrize("kind", KINDS)
def test_rewritten(kind: str) -> None:
    model, marked = (compiled(KINDS[kind], backend) for backend in ("eager", None))
    for one in (model, marked):
        one.train("dropout" in kind or kind == "train, with buffers").counts.eval()
        one.counts.train(kind == "train, with buffers")
    assert_same(step(model), step(marked))
    with model.disable_adapter():
        assert relative(model.eval()(IDS), Varied().eval()(IDS)) < 1e-6
    assert relative(model(IDS), Varied().eval()(IDS)) > 1e-3


@pytest.mark.parametrize("backend", [None, "eager"])
def test_two_at_once(backend: str | None) -> None:
    model = lora_fx.compile(Varied().eval(), TWO, backend=backend)
    for name in ("one", "two"):
        scatter(model, name)
    model.set_adapter(["one", "two"])
    both = step(model)
    assert adapters_in(both) == {"one", "two"}
    reference = lora_fx.compile(Varied().eval(), TWO, backend=None)
    reference.load_state_dict(model.state_dict())
    reference.set_adapter(["two", "one"])
    assert_same(both, step(reference))
    for name in ("one", "two"):
        model.set_adapter(name)
        assert adapters_in(step(model)) == {name}


def adapters_in(gradients: dict[str, Tensor]) -> set[str]:
    return {name.split()[0] for name in gradients if name != "output"}


@pytest.mark.parametrize("backend", [None, "eager"])
def test_rows_stand_beneath_an_adapter_of_the_embedding(
    backend: str | None, tmp_path: Path
) -> None:
    """Whichever came first, and whoever's it is."""
    rows = "adapter rows { rank = 2  init = random  target mix  tokens [3, 5] in embed }"
    low = "adapter low { rank = 2  init = random  target embed }"
    both = lora_fx.compile(Varied().eval(), f"lora 1 {rows} {low}", backend=backend)
    scatter(both, "rows")
    both.save_adapters(tmp_path)
    both.set_adapter(["rows", "low"])
    later = lora_fx.compile(Varied().eval(), f"lora 1 {low}", backend=backend)
    later.load_adapter(tmp_path / "rows", "rows", is_trainable=True)
    later.set_adapter(["rows", "low"])
    assert_same(step(later), step(both))
