"""A bar on a terminal, from the first report on, and nothing anywhere else."""

from contextlib import suppress

import pytest
from rich.console import Console

import lora_fx
from lora_fx.runtime import progress
from tests.tiny import llama

PISSA = "lora 1 adapter a { init = pissa target q_proj, v_proj }"
PLAIN = "lora 1 adapter a { target q_proj, v_proj }"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True)
    )


def test_nothing_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    lora_fx.compile(llama(2), PISSA, backend=None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("terminal")
def test_a_bar_while_something_takes_long(capfd: pytest.CaptureFixture[str]) -> None:
    lora_fx.compile(llama(2), PLAIN, backend=None)
    assert capfd.readouterr() == ("", "")
    lora_fx.compile(llama(2), PISSA, backend=None)
    out, err = capfd.readouterr()
    assert out == ""
    assert "init `pissa` of `model.layers" in err


@pytest.mark.usefixtures("terminal")
def test_it_goes_when_something_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with suppress(RuntimeError), progress.progress_bar() as report:
        report("one", 0, 2)
        raise RuntimeError
    assert capfd.readouterr().err.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")
