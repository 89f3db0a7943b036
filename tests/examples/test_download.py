import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import download
import prepare_minilm
import prepare_smollm2
import pytest

FOLDERS = {
    "smollm2-135m-instruct": (prepare_smollm2.prepare, prepare_smollm2.FILES),
    "all-minilm-l6-v2": (prepare_minilm.prepare, prepare_minilm.FILES),
}
Prepare = Callable[[], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FX_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_complete_folder_is_kept(name: str, tmp_path: Path) -> None:
    prepare, files = FOLDERS[name]
    (tmp_path / name).mkdir()
    for file in files:
        (tmp_path / name / file).touch()
    assert prepare() == tmp_path / name


@pytest.mark.parametrize("name", FOLDERS)
def test_a_failed_download_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, _ = FOLDERS[name]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="pip could not download"):
        prepare()
    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".lock"])


def test_an_incomplete_folder_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "half").touch()

    def make(work: Path, folder: Path, progress: object) -> None:
        assert work.parent == tmp_path
        folder.mkdir()
        (folder / "whole").touch()

    assert download.prepared("model", ["whole"], make) == tmp_path / "model"
    left = [path.name for path in tmp_path.rglob("*") if path.suffix != ".lock"]
    assert left == ["model", "whole"]


def test_who_wants_it_meanwhile_waits(tmp_path: Path) -> None:
    made = []

    def make(work: Path, folder: Path, progress: object) -> None:
        made.append(folder)
        time.sleep(0.3)
        folder.mkdir()
        (folder / "whole").touch()

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(download.prepared, "model", ["whole"], make) for _ in range(2)]
        assert [one.result() for one in waiting] == [tmp_path / "model"] * 2
    assert len(made) == 1
