"""Loading, binding and saving fail at every step they have: model and disk are as before."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx.spec.together import finish
from tests.adapters.peft.state import assert_same, snapshot
from tests.interrupted import Injected, fail_at, steps
from tests.tiny import llama, tokens

ROOT = Path(__file__).parent.parent.parent
SPEC = """lora 1
adapter default {
  rank = 2  init = random  target q_proj, down_proj  target embed_tokens
  train "model.norm"
}
"""
MORE = """lora 1
adapter default { rank = 2  init = random  lora_bias = true  target q_proj, v_proj  tokens [3, 7] }
"""
MERGEABLE = SPEC.replace("target embed_tokens", "tokens [3, 7]")
REPLICATED = lora_fx.parse(SPEC + "layers { replicate 0..2, 1..2 }\n")
STEPS = 40  # at least so many there are of each


@pytest.fixture(params=[pytest.param(5, marks=pytest.mark.slow), 11], ids=["many", "some"])
def every(request: pytest.FixtureRequest) -> int:
    """Of how many steps one is injected."""
    return request.param


def model(spec: str = SPEC) -> Any:
    return lora_fx.compile(llama(2), spec, backend=None)


def saved(folder: Path, spec: str = SPEC, more: float = 0.0) -> Path:
    """A folder; with `more`, one with the same modules and other values."""
    other = model(spec)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(more)
    other.save_pretrained(folder)
    return folder


def each_step_fails(
    every: int,
    rehearse: Callable[[], object],
    run: Callable[[], object],
    as_before: Callable[[], None],
) -> None:
    """Fail `run` at each step that `rehearse`, the same on something else, is seen to have."""
    rehearsal = steps(rehearse)
    assert len(rehearsal) > STEPS
    for step in rehearsal[::every]:
        with pytest.raises(Exception, match="injected"):  # as such, or as what became of it
            fail_at(run, step)
        as_before()


@pytest.mark.parametrize("spec", [SPEC, MORE], ids=["everything", "tokens"])
@pytest.mark.parametrize("present", [False, True], ids=["new", "over one that is there"])
def test_load_adapter(spec: str, present: bool, every: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", spec, more=1.0)
    first = saved(tmp_path / "before", spec)
    compiled, rehearsed = model(spec), model(spec)
    if present:
        compiled.load_adapter(first, "other")
        rehearsed.load_adapter(first, "other")
    before = snapshot(compiled)
    each_step_fails(
        every,
        lambda: rehearsed.load_adapter(folder, "other"),
        lambda: compiled.load_adapter(folder, "other"),
        lambda: assert_same(snapshot(compiled), before),
    )
    off = compiled(tokens()).logits
    compiled.load_adapter(folder, "other")
    for one in (compiled, rehearsed):
        one.set_adapter("other")
    assert torch.equal(compiled(tokens()).logits, rehearsed(tokens()).logits)
    assert not torch.equal(compiled(tokens()).logits, off)


@pytest.mark.parametrize("inplace", [False, True])
def test_compile(inplace: bool, every: int) -> None:
    base = llama(2)
    before, config = snapshot(base), base.config.to_dict()

    def run(given: nn.Module) -> Callable[[], object]:
        return lambda: lora_fx.compile(given, REPLICATED, backend="eager", inplace=inplace)

    def as_before() -> None:
        assert_same(snapshot(base), before)
        assert base.config.to_dict() == config

    run(llama(2))()  # makes classes, which are kept
    each_step_fails(every, run(llama(2)), run(base), as_before)
    run(base)()
    if inplace:
        assert snapshot(base).keys() != before.keys()
    else:
        as_before()


def test_compile_with_weights(every: int, tmp_path: Path) -> None:
    saved(tmp_path / "saved", more=1.0)
    (tmp_path / "a.lora").write_text('lora 1 adapter default { weights = "saved" }')
    spec, base = lora_fx.parse(tmp_path / "a.lora"), llama(2)
    before = snapshot(base)
    each_step_fails(
        every,
        lambda: lora_fx.compile(llama(2), spec, backend=None, inplace=True),
        lambda: lora_fx.compile(base, spec, backend=None, inplace=True),
        lambda: assert_same(snapshot(base), before),
    )


@pytest.mark.parametrize("artifact", [False, True], ids=["folder", "artifact"])
def test_load(artifact: bool, every: int, tmp_path: Path) -> None:
    place, base = tmp_path / "saved", llama(2)
    lora_fx.build(SPEC, base, place) if artifact else saved(place)
    before, there = snapshot(base), disk(tmp_path)

    def as_before() -> None:
        assert_same(snapshot(base), before)
        assert disk(tmp_path) == there

    lora_fx.load(place, llama(2), backend="eager")  # makes classes, which are kept
    each_step_fails(
        every,
        lambda: lora_fx.load(place, llama(2), backend="eager"),
        lambda: lora_fx.load(place, base, backend="eager"),
        as_before,
    )


MERGES: dict[str, Callable[[Any], object]] = {
    "merge": lambda compiled: compiled.merge_adapter(),
    "merge and unload": lambda compiled: compiled.merge_and_unload(),
    "unload": lambda compiled: compiled.unload(),
}


@pytest.mark.parametrize("beside", [False, True], ids=["first", "beside a merged one"])
@pytest.mark.parametrize("what", MERGES)
def test_merge(what: str, beside: bool, every: int, tmp_path: Path) -> None:
    other = MORE.replace("lora_bias = true", "").replace("[3, 7]", "[9, 11]")
    compiled, rehearsed, earlier = (model(MERGEABLE) for _ in range(3))
    for one in (compiled, rehearsed, earlier):
        one.load_adapter(saved(tmp_path / "saved", other), "other")
        if beside:
            one.merge_adapter("other")
    before, off = snapshot(compiled), compiled(tokens()).logits
    MERGES[what](earlier)  # makes classes and programs, which are kept
    each_step_fails(
        every,
        lambda: MERGES[what](rehearsed),
        lambda: MERGES[what](compiled),
        lambda: assert_same(snapshot(compiled), before),
    )
    assert torch.equal(compiled(tokens()).logits, off)
    MERGES[what](compiled)
    assert torch.equal(compiled(tokens()).logits, rehearsed(tokens()).logits)


def disk(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(folder.rglob("*"))
    }


LINKING = ("link from _keep", "PurePath.__fspath__ from _keep")
TIDYING = ("rmtree from whole_folder", "rmtree from together", "rmtree from _move")


@pytest.mark.parametrize("there", [False, True], ids=["new", "over one that is there"])
def test_save(there: bool, every: int, tmp_path: Path) -> None:
    compiled = model()
    compiled.load_adapter(saved(tmp_path / "one", MORE), "other")
    state = snapshot(compiled)

    def prepare(name: str) -> Path:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / name).mkdir()
        out = tmp_path / name / "runs" / "checkpoint-3"
        if there:
            saved(out, more=1.0)
            (out / "trainer_state.json").write_text("{}")
        return out

    prepare("out")
    before, out = disk(tmp_path / "out"), prepare("rehearsed")
    rehearsal = steps(lambda: compiled.save_pretrained(out))
    after, out = disk(out), prepare("out")
    assert len(rehearsal) > STEPS
    for step in rehearsal[::every]:
        try:
            fail_at(lambda: compiled.save_pretrained(out), step)
        except Injected:
            written = step[0] in TIDYING and disk(tmp_path / "out") != before
        else:  # then files are copied
            assert step[0] in LINKING, step
            written = True
        assert_same(snapshot(compiled), state)
        if written:
            finish(out)
            assert disk(out) == after
            prepare("out")
        assert disk(tmp_path / "out") == before, step


KILLED = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.interrupted import at_disk_change, disk_changes
from tests.runtime.test_transactions import model
place, compiled = Path(sys.argv[1]), model()
count = disk_changes(lambda: compiled.save_pretrained(place / "counted"))
for number in range(count + 1):
    if os.fork() == 0:
        with at_disk_change(number, lambda: os._exit(9)):
            compiled.save_pretrained(place / f"{number}")
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("there", [False, True], ids=["new", "over one that is there"])
def test_a_process_killed_at_any_write_of_a_save(there: bool, tmp_path: Path) -> None:
    """What is loaded afterwards is all old or all new."""
    old, new = saved(tmp_path / "old", MORE, more=1.0), saved(tmp_path / "new")
    for number in range(30 if there else 0):
        shutil.copytree(old, tmp_path / f"{number}")
    shutil.copytree(old, tmp_path / "counted") if there else None
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, cwd=ROOT)
    found = []
    for folder in sorted(tmp_path.glob("[0-9]*")):
        lora_fx.load(folder, llama(2), backend=None)
        tensors = load_file(folder / "adapter_model.safetensors")
        config = (folder / "adapter_config.json").read_text()
        matching = [name for name in (old, new) if holds(name, tensors, config)]
        assert len(matching) == 1, folder
        found += matching
    assert new in found
    assert (old in found) == there
    assert there or not all((tmp_path / f"{n}").exists() for n in range(3))


def holds(folder: Path, tensors: dict[str, torch.Tensor], config: str) -> bool:
    want = load_file(folder / "adapter_model.safetensors")
    same = want.keys() == tensors.keys() and all(torch.equal(tensors[n], want[n]) for n in want)
    return same and (folder / "adapter_config.json").read_text() == config
