import pytest

from lora_fx.diagnostics.pages import codes, page
from tests.cli.test_check import process, run


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
