"""Each code has a page, and what its examples show is so."""

import ast
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch

import lora_fx
from lora_fx import cli
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.diagnostics.pages import codes, page
from tests.diagnostics.page_folder import compiled, write_adapters, write_files
from tests.tiny import llama, tokens

TESTS = Path(__file__).parent.parent
PACKAGE = TESTS.parent / "lora_fx"
OTHER_SLUGS = {
    *("all-linear", "lora-fx", "text-generation", "xlm-roberta"),
    *("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
LORA = [code for code in codes() if "```lora\n" in page(code).text]
OTHERS = [code for code in codes() if code not in LORA]


def codes_in(path: Path) -> set[str]:
    """Every text of a file that looks like a code: words with hyphens."""
    constants = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant))
    texts = (constant.value for constant in constants if isinstance(constant.value, str))
    return {text for text in texts if re.fullmatch(r"[a-z]+(-[a-z]+)+", text)}


def test_a_page_for_each_code_and_none_without() -> None:
    used = set().union(*(codes_in(path) for path in PACKAGE.rglob("*.py"))) - OTHER_SLUGS
    assert set(codes()) == used


def test_a_golden_for_each_code() -> None:
    texts = "\n".join(path.read_text() for path in TESTS.rglob("*.expect"))
    shown = set(re.findall(r"^\w+\[([a-z-]+)\]: ", texts, re.MULTILINE))
    assert not set(codes()) - shown


@pytest.mark.parametrize("code", codes())
def test_form(code: str) -> None:
    text = page(code).text
    assert re.match(rf"# {code}: [^\n]{{10,80}}\n\n[A-Z`]", text)
    _, *rest = text.split("\n```")
    assert len(rest) == 4
    assert text.index("\n## Wrong\n\n```") < text.index("\n## Right\n\n```")
    assert max(map(len, text.splitlines())) <= 100


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs").mkdir()
    monkeypatch.chdir(tmp_path / "specs")
    write_files()


def examples(code: str) -> list[tuple[str, str]]:
    """The language and the text of the wrong example and of the right one."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page(code).text, re.DOTALL | re.MULTILINE)
    assert len(found) == 2
    return found


@pytest.mark.parametrize("code", LORA)
def test_specs(code: str, folder: None) -> None:
    (_, wrong), (_, right) = examples(code)
    found = said(wrong)
    assert code in {diagnostic.code for diagnostic in found}
    assert {d.code for d in found if d.severity == "error"} <= {code}
    assert said(right) == ()


def said(text: str) -> tuple[Diagnostic, ...]:
    """What is said of a file, alone or planned on a Llama of four layers."""
    Path("spec.lora").write_text(text)
    try:
        return lora_fx.plan(lora_fx.parse(Path("spec.lora")), llama(4)).notes
    except LoraFxError as error:
        return error.diagnostics


@pytest.mark.parametrize("code", OTHERS)
def test_programs_and_commands(
    code: str, folder: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (language, wrong), (_, right) = examples(code)
    if language == "sh":
        if code == "unwritable-file":
            monkeypatch.setattr(os, "replace", refuse)
        assert command(wrong, monkeypatch) == 1
        assert f"error[{code}]" in capfd.readouterr().err
        assert command(right, monkeypatch) == 0
        return
    assert language == "python"
    monkeypatch.setattr("lora_fx.runtime.units.unit.GRAPHS_PER_UNIT", 2)
    with pytest.raises(LoraFxError) as raised:
        run(wrong, code)
    assert {diagnostic.code for diagnostic in raised.value.diagnostics} == {code}
    shutil.rmtree("artifact", ignore_errors=True)  # where an example writes one
    run(right, code)


def run(example: str, code: str) -> None:
    write_adapters(example)
    backend = None
    if code == "too-many-graphs":
        example, backend = example.replace("range(100)", "range(4)"), "eager"
    names: dict[str, Any] = {"model": compiled(backend), "base": llama(4), "ids": tokens(2, 3)}
    exec(
        example,
        names | {"accelerate": accelerate, "lora_fx": lora_fx, "torch": torch, "peft": peft},
    )


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as raised:
        cli.main()
    return int(raised.value.code or 0)


def refuse(*_: object) -> None:
    raise OSError(30, "Read-only file system")
