from pathlib import Path

import pytest

from lora_fx.diagnostics.pages import codes, page
from tests.cli.test_check import process, run
from tests.golden import assert_golden
from tests.tiny import llama


def test_a_page_as_plain_text(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "explain", "unmatched-target") == 0
    assert capfd.readouterr() == (page("unmatched-target").text, "")


def test_a_page_on_a_terminal() -> None:
    out = process("explain", "unmatched-target", FORCE_COLOR="1", COLUMNS="60").stdout
    assert "\x1b[" in out
    assert "```" not in out
    assert "\x1b[1munmatched-target: " in out
    assert "adapter default { target q_prj, v_proj }" in out


def test_all_codes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "explain") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == codes()
    assert all(line.endswith(f"  {page(line.split()[0]).summary}") for line in lines)


def test_an_unknown_code(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "explain", "unmatched-traget") == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "there is no diagnostic `unmatched-traget`; did you mean `unmatched-target`?" in err
    assert run(monkeypatch, "explain", "xyzzy") == 2
    assert "`lora-fx explain` lists them all" in capfd.readouterr().err


def test_the_brackets_may_be_copied_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "explain", "error[unmatched-target]") == 0
    assert capfd.readouterr().out == page("unmatched-target").text


def test_a_module_of_a_spec(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    llama(3).config.save_pretrained("model")
    Path("a.lora").write_text(
        "lora 1\nadapter a {\n  rank = 2\n  target q_proj { rank = 3 }\n"
        "  target linear in layers[1..]\n}\n"
    )
    arguments = ("--model", "model")
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        fqn = f"model.layers.0.{name}"
        assert run(monkeypatch, "explain", "a.lora", fqn, *arguments) == 0
    assert_golden(Path(__file__).with_name("explain.expect"), capfd.readouterr().out)
    assert run(monkeypatch, "explain", "a.lora") == 2
    assert "`lora-fx explain SPEC MODULE`" in capfd.readouterr().err
