from pathlib import Path

import pytest

from tests.cli.test_check import run
from tests.golden import assert_golden
from tests.tiny import llama

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama(4).config.save_pretrained("model")
    Path("a.lora").write_text('lora 1 model "model" adapter x { target q_proj }')


def test_without_a_lock(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "plan", "a.lora", "--locked") == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert_golden(HERE / "no-lock.expect", err)


def test_a_damaged_lock(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.lora.lock").write_text("{}")
    assert run(monkeypatch, "plan", "a.lora") == 0
    assert capfd.readouterr().err.startswith("warning[bad-lock]")
    assert run(monkeypatch, "plan", "a.lora", "--detailed-exitcode") == 2
    capfd.readouterr()
    assert run(monkeypatch, "plan", "a.lora", "--locked") == 1
    assert capfd.readouterr().err.startswith("error[bad-lock]")
    assert run(monkeypatch, "plan", "a.lora", "--lock") == 0
    assert run(monkeypatch, "plan", "a.lora", "--locked", "--detailed-exitcode") == 0


def test_an_error_is_1_whatever_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "plan", "a.lora", "--lock") == 0
    before = Path("a.lora.lock").read_text()
    Path("a.lora").write_text('lora 1 model "model" adapter x { target none }')
    assert run(monkeypatch, "plan", "a.lora", "--detailed-exitcode") == 1
    assert run(monkeypatch, "plan", "a.lora", "--lock") == 1
    assert Path("a.lora.lock").read_text() == before


def test_writing_and_comparing_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "plan", "a.lora", "--lock", "--locked") == 2
    assert not Path("a.lora.lock").exists()
