"""`lora-fx convert` on folders."""

import sys
from pathlib import Path
from typing import Any

import pytest

import lora_fx
from lora_fx import cli
from tests.dense import relative
from tests.runtime.test_convert import changed
from tests.runtime.test_merge import logits
from tests.tiny import llama


def test_a_model_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = llama(2).eval()
    tuned: Any = changed(base, 3).eval()
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    line = "lora-fx convert tuned --model base --rank 3 --out out"
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert not raised.value.code
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * 7 + 1 + 1  # the head, and what was written
    assert all(float(one.split()[-1]) < 1e-5 for one in printed[:-1])
    loaded: Any = lora_fx.load("out", llama(2), backend=None).eval()
    assert relative(logits(loaded), logits(tuned)) < 1e-5
    assert relative(logits(base), logits(tuned)) > 1e-2
