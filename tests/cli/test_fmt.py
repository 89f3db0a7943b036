import io
import os
import stat
import sys
from pathlib import Path

import pytest

from tests.cli.test_check import modules, process, run
from tests.golden import assert_golden

UGLY = "\ufefflora 1\r\nadapter x{rank=8;target linear # all\r\n}"
NEAT = "lora 1\nadapter x {\n  rank = 8\n  target linear  # all\n}\n"
BROKEN = "lora 1\nadapter x { rank 8 }\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ugly.lora").write_bytes(UGLY.encode())
    (tmp_path / "neat.lora").write_bytes(NEAT.encode())
    (tmp_path / "broken.lora").write_bytes(BROKEN.encode())
    return tmp_path


def test_files_are_formatted_in_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "neat.lora").stat()
    assert run(monkeypatch, "fmt", "ugly.lora", "neat.lora") == 0
    assert capfd.readouterr() == ("formatted ugly.lora\n", "")
    assert (folder / "ugly.lora").read_bytes() == NEAT.encode()
    after = (folder / "neat.lora").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_cannot_be_read_stays_and_the_rest_is_formatted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "bytes.lora").write_bytes(b"lora 1 # \xff")
    assert run(monkeypatch, "fmt", "broken.lora", "bytes.lora", "none.lora", "ugly.lora") == 1
    out, err = capfd.readouterr()
    assert out == "formatted ugly.lora\n"
    assert "error[syntax-error]: expected `=` before `8`\n --> broken.lora:2:18" in err
    assert err.count("error[unreadable-file]") == 2
    assert (folder / "broken.lora").read_text() == BROKEN


def test_check_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "fmt", "--check", "neat.lora") == 0
    assert run(monkeypatch, "fmt", "--check", "ugly.lora", "neat.lora") == 1
    assert capfd.readouterr() == ("would format ugly.lora\n", "")
    assert (folder / "ugly.lora").read_bytes() == UGLY.encode()


def test_diff_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "fmt", "--diff", "ugly.lora", "neat.lora") == 0
    out = capfd.readouterr().out
    assert run(monkeypatch, "fmt", "--diff", "--check", "ugly.lora") == 1
    assert capfd.readouterr().out == out
    assert (folder / "ugly.lora").read_bytes() == UGLY.encode()
    assert out == (
        "--- ugly.lora\tnow\n+++ ugly.lora\tformatted\n@@ -1,3 +1,5 @@\n"
        "-\ufefflora 1\r\n-adapter x{rank=8;target linear # all\r\n-}\n"
        "\\ No newline at end of file\n"
        "+lora 1\n+adapter x {\n+  rank = 8\n+  target linear  # all\n+}\n"
    )


def test_from_stdin_to_stdout(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fed(text: str, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return run(monkeypatch, "fmt", "-", *options), *capfd.readouterr()

    assert fed(UGLY) == (0, NEAT, "")
    assert fed(NEAT) == (0, NEAT, "")
    assert fed(UGLY, "--check") == (1, "would format <stdin>\n", "")
    code, out, err = fed(BROKEN)
    assert (code, out) == (1, "")
    assert "--> <stdin>:2:18" in err


def test_permissions_and_links_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ugly = folder / "ugly.lora"
    ugly.chmod(0o640)
    (folder / "link.lora").symlink_to("ugly.lora")
    assert run(monkeypatch, "fmt", "link.lora") == 0
    assert (folder / "link.lora").is_symlink()
    assert ugly.read_text() == NEAT
    assert stat.S_IMODE(ugly.stat().st_mode) == 0o640


def test_a_write_that_fails_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert run(monkeypatch, "fmt", "ugly.lora") == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert_golden(Path(__file__).parent / "unwritable-file.expect", err)
    assert (folder / "ugly.lora").read_bytes() == UGLY.encode()
    assert sorted(path.name for path in folder.iterdir()) == [
        "broken.lora",
        "neat.lora",
        "ugly.lora",
    ]


def test_it_loads_only_what_it_needs(folder: Path) -> None:
    assert not modules("neat.lora", "fmt") & {"torch", "numpy", "rich"}
    assert process("fmt", "--check", "neat.lora").returncode == 0
