"""Every diagnostic as users see it: `<code>[-case].lora` and what lora_fx says of it, `.expect`.

Those in `plan/` are planned on a Llama of four layers.
"""

import re
from pathlib import Path

import pytest

import lora_fx
from lora_fx.diagnostics import LoraFxError, render
from tests.golden import assert_golden
from tests.tiny import llama

HERE = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(HERE.glob("*.lora")), ids=lambda path: path.stem)
def test_what_is_wrong_with_a_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with pytest.raises(LoraFxError) as raised:
        lora_fx.parse(Path(path.name))
    assert_said(path, render(raised.value.diagnostics))


@pytest.mark.parametrize("path", sorted(HERE.glob("plan/*.lora")), ids=lambda path: path.stem)
def test_what_is_wrong_with_a_plan(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    try:
        said = lora_fx.plan(Path(path.name), llama(4)).notes
    except LoraFxError as error:
        said = error.diagnostics
    assert_said(path, render(said))


def assert_said(path: Path, text: str) -> None:
    codes = re.findall(r"^\w+\[([a-z-]+)\]", text, re.MULTILINE)
    assert any(path.stem.startswith(code) for code in codes)
    assert_golden(path.with_suffix(".expect"), text)
