"""Scalings multiplied inside a block."""

from pathlib import Path
from typing import Any

import pytest
from peft.helpers import rescale_adapter_scale

import lora_fx
from tests.adapters.kinds import scatter
from tests.dense import relative
from tests.runtime.test_combine import effective, loaded_by_peft
from tests.runtime.test_merge import logits
from tests.tiny import graphs, llama, tokens


def compiled(settings: str = "init = random", backend: Any = None) -> Any:
    text = f"lora 1 adapter default {{ rank = 3 alpha = 5 {settings} target q_proj, up_proj }}"
    model: Any = lora_fx.compile(llama(2), text, backend=backend).eval()
    scatter(model)
    return model


@pytest.mark.parametrize("settings", ["init = random", "init = pissa"])
def test_what_adapters_add_is_multiplied(settings: str) -> None:
    model = compiled(settings)
    whole = effective(model, "default")
    with model.rescale_adapter_scale(0.5), model.rescale_adapter_scale(-3):
        part = effective(model, "default")
    assert all(relative(part[fqn], -1.5 * whole[fqn]) < 1e-6 for fqn in whole)
    again = effective(model, "default")
    assert all((again[fqn] == whole[fqn]).all() for fqn in whole)
    with model.rescale_adapter_scale(0):
        assert relative(logits(model), logits(llama(2).eval())) < 1e-5


@pytest.mark.parametrize("settings", ["init = random", "init = random variant = dora"])
def test_as_peft(settings: str, tmp_path: Path) -> None:
    model = compiled(settings)
    model.save_pretrained(tmp_path)
    theirs = loaded_by_peft(tmp_path, llama(2))
    with rescale_adapter_scale(theirs, 0.4):
        want = theirs(tokens()).logits
    whole = logits(model)
    with model.rescale_adapter_scale(0.4):
        assert relative(model(tokens()).logits, want) < 1e-5
        assert relative(logits(model), whole) > 1e-3
        model.save_pretrained(tmp_path / "inside")
    loaded = lora_fx.load(tmp_path / "inside", llama(2), backend=None).eval()
    assert relative(logits(loaded), whole) < 1e-6


def test_no_graph_is_made_and_an_error_inside_leaves_nothing_behind() -> None:
    model = compiled(backend="eager")
    whole, made = logits(model), graphs()
    with model.rescale_adapter_scale(0.4):
        assert relative(logits(model), whole) > 1e-3
    with pytest.raises(KeyError), model.rescale_adapter_scale(0.4):
        raise KeyError
    assert (logits(model) == whole).all()
    assert graphs() == made


def test_what_is_refused() -> None:
    model = compiled()
    for number in ("half", float("inf")):
        with pytest.raises(lora_fx.LoraFxError, match="no finite"):
            model.rescale_adapter_scale(number).__enter__()
    outside = pytest.raises(lora_fx.LoraFxError, match="merge outside")
    with model.rescale_adapter_scale(0.4), outside:
        model.merge_adapter()
    model.merge_adapter()
    with pytest.raises(lora_fx.LoraFxError, match="is merged"):
        model.rescale_adapter_scale(0.4).__enter__()
    with pytest.raises(lora_fx.LoraFxError, match="has norms of"):
        compiled("init = pissa variant = dora").rescale_adapter_scale(0.4).__enter__()


def test_the_model_is_not_unloaded_inside() -> None:
    """What ends the block is a method of the compiled model."""
    model = compiled()
    whole = logits(model)
    with (
        pytest.raises(lora_fx.LoraFxError, match="unload outside"),
        model.rescale_adapter_scale(0.4),
    ):
        model.unload()
    assert (logits(model) == whole).all()
    model.unload()
    assert (logits(model) == logits(llama(2).eval())).all()
