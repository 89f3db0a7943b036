import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_fx import cli

GOOD = "lora 1\nadapter x { target linear }\n"
BAD = "lora 1\nadapter x { rank = 0 target linear }\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.lora").write_text(GOOD)
    (tmp_path / "bad.lora").write_text(BAD)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lora-fx", *arguments])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    code = raised.value.code
    return code if isinstance(code, int) else 0


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from lora_fx.cli import main; main()"
    path = str(Path(cli.__file__).parent.parent.parent)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={k: v for k, v in os.environ.items() if "COLOR" not in k}
        | {"PYTHONPATH": path}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_good_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", "good.lora") == 0
    assert capfd.readouterr() == ("ok good.lora\n", "")


def test_every_file_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", "bad.lora", "good.lora", "none.lora") == 1
    out, err = capfd.readouterr()
    assert out == "ok good.lora\n"
    assert (
        err
        == """\
error[wrong-value]: `rank` must be a whole number of at least 1
 --> bad.lora:2:20
  |
2 | adapter x { rank = 0 target linear }
  |                    ^ is 0

error[unreadable-file]: `none.lora` cannot be read
  = note: No such file or directory

More, with examples: lora-fx explain wrong-value
"""
    )


def test_a_document_for_programs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", "--json", "bad.lora", "good.lora", "none.lora") == 1
    out, err = capfd.readouterr()
    first, second = json.loads(out)["diagnostics"]
    assert (first["code"], first["span"]["file"]) == ("wrong-value", "bad.lora")
    assert (second["code"], second["span"]) == ("unreadable-file", None)
    assert err == ""
    assert run(monkeypatch, "check", "--json", "good.lora") == 0
    assert json.loads(capfd.readouterr().out) == {"diagnostics": []}


def test_a_log_for_code_scanning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", "--sarif", "bad.lora", "good.lora", "none.lora") == 1
    out, err = capfd.readouterr()
    (log,) = json.loads(out)["runs"]
    assert [result["ruleId"] for result in log["results"]] == ["wrong-value", "unreadable-file"]
    assert err == ""
    assert run(monkeypatch, "check", "--sarif", "good.lora") == 0
    assert json.loads(capfd.readouterr().out)["runs"][0]["results"] == []


def test_one_document_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "check", "--json", "--sarif", "good.lora") == 2


def test_colour_is_for_terminals(folder: Path) -> None:
    assert "\x1b[" not in process("check", "bad.lora").stderr
    assert "\x1b[1;31merror" in process("check", "bad.lora", FORCE_COLOR="1").stderr
    dull = process("check", "bad.lora", FORCE_COLOR="1", NO_COLOR="1").stderr
    assert "\x1b[31m" not in dull
    assert "31merror" not in dull


def test_a_misspelt_command(folder: Path) -> None:
    done = process("chekc", "good.lora")
    assert done.returncode == 2
    assert "check" in done.stderr.replace("chekc", "")


def test_it_loads_only_what_it_needs(folder: Path) -> None:
    """What makes it quick; `tests/benchmarks/check_command.py` times it."""
    loaded = modules("good.lora")
    assert {"lark", "typer"} <= loaded
    assert not loaded & {"torch", "numpy", "transformers", "rich", "pygments", "asyncio"}
    assert not {name for name in loaded if name.startswith("lora_fx.")} & {
        f"lora_fx.cli.{name}" for name in cli.COMMANDS if name != "check"
    }
    assert "rich" in modules("bad.lora")


def modules(spec: str, command: str = "check") -> set[str]:
    """The modules that a command loads for a file."""
    done = process(command, spec, PYTHONPROFILEIMPORTTIME="1")
    times = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in times}


def test_the_grammar_is_built_once_a_machine(folder: Path) -> None:
    (folder / "cache").mkdir()
    for _ in range(2):
        assert process("check", "good.lora", LORA_FX_CACHE="cache").stdout == "ok good.lora\n"
    (kept,) = (folder / "cache").iterdir()
    made = kept.stat()
    assert process("check", "good.lora", LORA_FX_CACHE="cache").returncode == 0
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    kept.write_bytes(b"damaged")
    assert process("check", "good.lora", LORA_FX_CACHE="cache").returncode == 0
    assert kept.stat().st_size > 1000
    assert process("check", "good.lora", LORA_FX_CACHE="/dev/null").returncode == 0
