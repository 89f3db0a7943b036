"""`lora-fx merge`: the command around `lora_fx.merge`."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.cli.test_check import run
from tests.dense import relative
from tests.runtime.streamed.test_streamed_merge import given, merged
from tests.runtime.test_merge import logits


def test_it_writes_what_the_merges_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = given()
    with Path("a.lora").open("a") as file:
        file.write('merge both { from one + two  save = "both" }')
    capfd.readouterr()
    assert run(monkeypatch, "merge", "a.lora") == 0
    assert capfd.readouterr() == ("wrote out\nwrote both\n", "")
    got = AutoModelForCausalLM.from_pretrained("out").eval()
    assert relative(logits(got), logits(merged(trained))) < 1e-5
    assert Path("both/adapter_model.safetensors").exists()
    capfd.readouterr()
    assert run(monkeypatch, "merge", "a.lora") == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("error[artifact-exists]") == 2
    assert run(monkeypatch, "merge", "a.lora", "--model", "base", "--force") == 0
