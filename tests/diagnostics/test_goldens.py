"""Every diagnostic as users see it: `<code>[-case].lora` and what lora_fx says of it, `.expect`.

Those in `plan/` are planned on a Llama of four layers.
"""

import ast
import re
from pathlib import Path

import pytest

import lora_fx
from lora_fx.diagnostics import LoraFxError, render
from tests.golden import assert_golden
from tests.tiny import llama

HERE = Path(__file__).parent
TESTS = HERE.parent
PACKAGE = TESTS.parent / "lora_fx"


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


def codes_of(path: Path) -> set[str]:
    """The slugs that a file of the package passes first to something: its diagnostic codes."""
    text = path.read_text()
    if "import Diagnostic" not in text:
        return set()
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and node.args]
    firsts = [str(c.args[0].value) for c in calls if isinstance(c.args[0], ast.Constant)]
    return {first for first in firsts if re.fullmatch(r"[a-z]+(-[a-z]+)+", first)}


def test_every_code_is_shown_or_asserted_somewhere() -> None:
    codes = set().union(*(codes_of(path) for path in PACKAGE.rglob("*.py")))
    assert len(codes) > 40
    shown = "".join(path.read_text() for path in TESTS.rglob("*.expect"))
    asserted = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    missing = {c for c in codes if f"[{c}]" not in shown and f'"{c}"' not in asserted}
    assert not missing
