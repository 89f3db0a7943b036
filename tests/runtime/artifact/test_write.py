"""What is in an artifact, and that it is there whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

import lora_fx
from lora_fx.plan.lock import lock_of
from lora_fx.runtime.artifact import layout
from lora_fx.runtime.artifact.manifest import read_manifest
from tests.interrupted import Injected, at_disk_change, disk_changes, fail, fail_at, steps
from tests.runtime.artifact.made import build, text
from tests.tiny import llama

ROOT = Path(__file__).parent.parent.parent.parent
DATA = {".md", ".json", ".lock", ".lora", ".txt", ".safetensors"}


def test_what_is_in_it(artifact: Path) -> None:
    names = {path.relative_to(artifact).as_posix() for path in layout.files_below(artifact)}
    assert {name for name in names if not name.startswith(("cache/", "graphs/"))} == {
        *("artifact.json", "plan.json", "spec.lora", "spec.lora.lock"),
        "adapters/default/README.md",
        "adapters/default/adapter_config.json",
        "adapters/default/adapter_model.safetensors",
    }
    stages = ("captured", "adapted", "fused", "lowered")
    parts = ("00", "01")  # the layers, the loss
    graphs = {f"graphs/forward/{part}-{stage}.txt" for part in parts for stage in stages}
    assert {name for name in names if name.startswith("graphs/")} == graphs
    assert "cache/functions/000.bin" in names
    assert any(name.startswith("cache/kernels/") and name.endswith(".so") for name in names)
    assert {Path(n).suffix for n in names if not n.startswith("cache/")} <= DATA
    plan = lora_fx.plan(text(), llama(2))
    assert json.loads((artifact / layout.LOCK).read_text()) == json.loads(
        json.dumps(lock_of(plan).to_json())
    )
    assert (artifact / layout.SPEC).read_text() == text()
    captured = (artifact / "graphs/forward/00-captured.txt").read_text()
    assert "lora_fx.site(" in captured
    assert "@self_attn.q_proj.lora_A.default.weight" in captured
    assert "cross_entropy(" in (artifact / "graphs/forward/01-captured.txt").read_text()
    assert "lora_fx." not in (artifact / "graphs/forward/00-lowered.txt").read_text()


def test_no_path_of_this_machine_is_in_the_data(artifact: Path) -> None:
    for path in layout.files_below(artifact):
        if path.suffix in DATA and layout.CACHE not in path.parts:
            assert str(Path.home()).encode() not in path.read_bytes()


def test_every_file_is_held_by_its_hash(artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "copy"))
    for path in layout.files_below(folder):
        content = path.read_bytes()
        for damaged in (content[:-1], content + b"\n", None):
            path.write_bytes(damaged) if damaged is not None else path.unlink()
            if path.name == layout.MANIFEST and (damaged or b"").strip() == content.strip():
                continue  # the same JSON
            if path.name == layout.MANIFEST and damaged is None:
                with pytest.raises(lora_fx.LoraFxError, match=r"holds adapters|no adapter"):
                    lora_fx.load(folder)
                continue
            with pytest.raises(lora_fx.LoraFxError, match="artifact-damaged") as raised:
                read_manifest(folder)
            assert path.name in str(raised.value)
        path.write_bytes(content)
    read_manifest(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "cache/../../outside"])
def test_a_file_outside_is_refused(artifact: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "copy"))
    (tmp_path / "outside").write_text("x")
    manifest = json.loads((folder / layout.MANIFEST).read_text())
    manifest["files"][name] = sha256(b"x").hexdigest()
    (folder / layout.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(lora_fx.LoraFxError, match="outside the artifact"):
        lora_fx.load(folder, llama(2))


def test_all_damaged_files_are_named_at_once(artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "copy"))
    (folder / layout.PLAN).unlink()
    (folder / layout.LOCK).write_text("{}")
    with pytest.raises(lora_fx.LoraFxError) as raised:
        lora_fx.load(folder, llama(2))
    assert [d.code for d in raised.value.diagnostics] == ["artifact-damaged"] * 2


def state(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in layout.files_below(folder)
    }


def test_an_artifact_is_replaced_only_if_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(out, text(""))
    before = state(out)
    with pytest.raises(lora_fx.LoraFxError, match="artifact-exists"):
        build(out, text("", adapter="dropout = 0.5"))
    assert state(out) == before
    build(out, text("", adapter="dropout = 0.5"), force=True)
    assert "dropout" in (out / layout.SPEC).read_text()
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_no_artifact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(lora_fx.LoraFxError, match="is no artifact"):
            build(out, text(""), force=True)
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty", text(""))
    assert layout.is_artifact(tmp_path / "empty")


def test_a_model_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(lora_fx.LoraFxError, match="unmatched-target"):
        build(tmp_path / "deep" / "out", text("").replace("q_proj", "query"))
    assert list(tmp_path.iterdir()) == []


NEW = text("", adapter="dropout = 0.5")


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_at_any_write_leaves_what_was_there(there: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there:
        build(out, text(""))
    before = state(out) if there else None
    count = disk_changes(lambda: build(tmp_path / "counted", NEW))
    shutil.rmtree(tmp_path / "counted")
    assert count > 10
    for number in range(count):
        try:
            with at_disk_change(number, fail):
                build(out, NEW, force=True)
        except (Injected, lora_fx.LoraFxError, UserWarning):
            assert (state(out) if out.exists() else None) == before, number
            assert [p.name for p in tmp_path.iterdir()] == (["out"] if there else [])
        else:  # only what stood beside it was not tidied up, or not trusted
            read_manifest(out)
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
            if there:
                build(out, text(""))


def test_a_failure_at_any_step_leaves_what_was_there(tmp_path: Path) -> None:
    out, base = tmp_path / "out", llama(2)
    build(out, text(""))
    before = state(out)
    build(tmp_path / "rehearsed", text(""))
    rehearsal = steps(lambda: lora_fx.build(NEW, base, tmp_path / "rehearsed", force=True))
    shutil.rmtree(tmp_path / "rehearsed")
    assert len(rehearsal) > 100
    for step in rehearsal[::5]:
        if step[0] == "rmtree from whole_folder":
            continue  # the old one is removed when the new one is in its place
        with pytest.raises(Exception, match=r"injected|kept record"):
            fail_at(lambda: lora_fx.build(NEW, base, out, force=True), step)
        assert state(out) == before, step
        assert list(tmp_path.iterdir()) == [out]


KILLED = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.interrupted import at_disk_change, disk_changes
from tests.runtime.artifact.made import build, text
from tests.runtime.artifact.test_write import NEW
place = Path(sys.argv[1])
count = disk_changes(lambda: build(place / "counted", NEW))
for number in range(count):
    for there in (False, True):
        out = place / f"{number}-{there}" / "out"
        if there:
            build(out, text(""))
        if os.fork() == 0:
            with at_disk_change(number, lambda: os._exit(9)):
                build(out, NEW, force=True)
            os._exit(0)
        os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_at_any_write_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    environment = os.environ | {"LORA_FX_CACHE": str(tmp_path / "own")}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    new = state(tmp_path / "counted")
    seen = set()
    for folder in tmp_path.glob("*-*"):
        out = folder / "out"
        if not out.exists():
            assert folder.name.endswith("False")
            seen.add("none")
            continue
        read_manifest(out)
        spec = (out / layout.SPEC).read_text()
        assert spec in (text(""), NEW)
        seen.add("new" if spec == NEW else "old")
        if spec == NEW:
            assert state(out).keys() == new.keys()
    assert seen == {"none", "old", "new"}
