"""Files that change together, interrupted everywhere."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_fx.spec.together import finish, together
from lora_fx.spec.whole_folder import whole_folder
from tests.interrupted import Injected, at_disk_change, disk_changes, fail

ROOT = Path(__file__).parent.parent.parent
OLD = {"a": "old a", "b": "old b", "other": "not ours", "below/a": "old below"}
NEW = {"a": "new a", "b": "new b", "below/a": "new below", "new/c": "new c"}


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    """Every file by its path, folders too, so that empty ones are seen."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def of(files: dict[str, str]) -> dict[str, str]:
    folders = {Path(name).parent.as_posix(): "" for name in files}
    return {name: text for name, text in {**folders, **files}.items() if name != "."}


def save(folder: Path) -> None:
    with together(folder) as beside:
        put(beside, NEW)


def replace(folder: Path) -> None:
    with whole_folder(folder) as beside:
        put(beside, NEW)


WAYS: list[tuple[Callable[[Path], None], dict[str, str]]] = [(save, {**OLD, **NEW}), (replace, NEW)]


@pytest.mark.parametrize(("way", "after"), WAYS)
def test_all_of_it(way: Callable[[Path], None], after: dict[str, str], tmp_path: Path) -> None:
    put(tmp_path / "out", OLD)
    way(tmp_path / "out")
    assert content(tmp_path / "out") == of(after)
    way(tmp_path / "deep" / "new")
    assert content(tmp_path / "deep" / "new") == of(NEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "out"]


@pytest.mark.parametrize(("way", "after"), WAYS)
@pytest.mark.parametrize("old", [OLD, None])
def test_a_failure_anywhere_changes_nothing(
    way: Callable[[Path], None],
    after: dict[str, str],
    old: dict[str, str] | None,
    tmp_path: Path,
) -> None:
    def prepare(name: str) -> Path:
        put(tmp_path / name / "there", {"x": "1"})
        if old:
            put(tmp_path / name / "deep" / "out", old)
        return tmp_path / name

    count = disk_changes(lambda: way(prepare("counted") / "deep" / "out"))
    failed = 0
    for number in range(count):
        folder = prepare(str(number))
        before = content(folder)
        try:
            with at_disk_change(number, fail):
                way(folder / "deep" / "out")
        except Injected:
            failed += 1
            assert content(folder) == before, number
        else:  # it was only tidying up
            finish(folder / "deep" / "out")
            assert content(folder / "deep" / "out") == of(after if old else NEW), number
    assert failed > 5


KILLED = """
import os, sys
from pathlib import Path
from tests.interrupted import at_disk_change
from tests.spec.test_together import {way}
for number in range({count}):
    if os.fork() == 0:
        with at_disk_change(number, lambda: os._exit(9)):
            {way}(Path(sys.argv[1], str(number), "out"))
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("way", "after"), WAYS)
@pytest.mark.parametrize("old", [OLD, None])
def test_a_process_killed_anywhere_leaves_the_old_or_the_new(
    way: Callable[[Path], None],
    after: dict[str, str],
    old: dict[str, str] | None,
    tmp_path: Path,
) -> None:
    def prepare(name: str) -> Path:
        (tmp_path / name).mkdir()
        put(tmp_path / name / "out", old or {})
        return tmp_path / name / "out"

    count = disk_changes(lambda: way(prepare("counted")))
    folders = [prepare(str(number)) for number in range(count)]
    program = KILLED.format(way=way.__name__, count=count)
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=ROOT)
    states = []
    for folder in folders:
        finish(folder) if folder.exists() else None
        found = {
            name: text
            for name, text in (content(folder) if folder.exists() else {}).items()
            if not name.startswith(".saving-") and text
        }
        assert found in (old or {}, after if old else NEW), folder
        states.append(found == (old or {}))
    assert True in states
    assert False in states


def test_what_a_killed_process_left_to_move_is_moved(tmp_path: Path) -> None:
    left = {"b": "new b", "new/c": "new c", ".old/b": "old b"}
    put(tmp_path, OLD)
    put(tmp_path / ".lora_fx-saved", left)
    finish(tmp_path)
    assert content(tmp_path) == of({**OLD, "b": "new b", "new/c": "new c"})


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    put(tmp_path, OLD)
    save(tmp_path)
    assert content(tmp_path) == of({**OLD, **NEW})


def test_where_folders_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_fx.spec.whole_folder._renameat2", lambda *_: -1)
    put(tmp_path / "out", OLD)
    replace(tmp_path / "out")
    assert content(tmp_path) == {**{"out": ""}, **{f"out/{n}": t for n, t in of(NEW).items()}}
