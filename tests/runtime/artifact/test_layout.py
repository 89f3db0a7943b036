"""An artifact of a model whose weights have room beside them."""

from pathlib import Path

import pytest
import torch

import lora_fx
from lora_fx.graph.room import has_room
from lora_fx.passes.aten import accumulate_products as sums
from tests.runtime.artifact.made import BATCH, LENGTH, build, one_program_each, text
from tests.tiny import assert_differ, graphs, llama, tokens, uncached


def test_its_code_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_LEAST", 0)
    one_program_each(monkeypatch)
    spec = text(more="layout = augmented")
    with uncached():
        build(tmp_path / "out", spec)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(b"augmented_products" in path.read_bytes() for path in files)
    before = graphs()
    model = lora_fx.load(tmp_path / "out", llama(2)).eval()
    marked = lora_fx.compile(llama(2), spec, backend=None).eval()
    assert has_room(model.model.layers[1].mlp.up_proj.weight)
    with torch.no_grad():
        for one in (model, marked):
            one.model.layers[1].mlp.up_proj.lora_B["default"].weight.add_(0.5)
        got, want = (one(tokens(BATCH, LENGTH)).logits for one in (model, marked))
        assert torch.allclose(got, want, atol=1e-5)
        assert graphs() == before
        with marked.disable_adapter():
            assert_differ([got], [marked(tokens(BATCH, LENGTH)).logits])
