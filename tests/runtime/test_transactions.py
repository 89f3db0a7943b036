"""Loading, binding and saving fail at every step they have: model and disk are as before."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from tests.adapters.peft.state import assert_same, snapshot
from tests.interrupted import Injected, Step, at_disk_change, disk_changes, fail, fail_at, steps
from tests.tiny import llama, tokens

SPEC = """lora 1
adapter default {
  rank = 2  init = random  lora_bias = true
  target linear
  target embed_tokens { lora_bias = false }
  train "model.norm"
}
"""
MORE = """lora 1
adapter default { rank = 2  init = random  target q_proj, v_proj  tokens [3, 7]  bias = none }
"""
REPLICATED = SPEC + "layers { replicate 0..2, 1..2 }\n"


def model(spec: str = SPEC) -> nn.Module:
    return lora_fx.compile(llama(2), spec, backend=None)


def saved(folder: Path, spec: str) -> Path:
    model(spec).save_pretrained(folder)
    return folder


def changed(folder: Path, spec: str) -> Path:
    """A folder with the same modules and other values."""
    other = model(spec)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    other.save_pretrained(folder)
    return folder


def everywhere(run: Callable[[], object], as_before: Callable[[Step], None]) -> None:
    """Fail `run` at each of its steps."""
    for step in steps_of_a_rehearsal(run):
        try:
            fail_at(run, step)
        except Injected:
            as_before(step)


def steps_of_a_rehearsal(run: Callable[[], object]) -> list[Step]:
    found = steps(run)
    assert len(found) > 60
    return found


@pytest.mark.parametrize("spec", [SPEC, MORE], ids=["everything", "tokens"])
@pytest.mark.parametrize("present", [False, True], ids=["new", "over one that is there"])
def test_load_adapter(spec: str, present: bool, tmp_path: Path) -> None:
    folder = changed(tmp_path / "saved", spec)
    compiled = model(spec)
    if present:
        compiled.load_adapter(saved(tmp_path / "before", spec), "other")
    before = snapshot(compiled)
    rehearsed = lora_fx.compile(llama(2), spec, backend=None)
    if present:
        rehearsed.load_adapter(tmp_path / "before", "other")
    failures = 0
    for step in steps_of_a_rehearsal(lambda: rehearsed.load_adapter(folder, "other")):
        try:
            fail_at(lambda: compiled.load_adapter(folder, "other"), step)
        except Injected:
            failures += 1
            assert_same(snapshot(compiled), before)
        else:
            raise AssertionError(f"{step} was not reached")
    assert failures > 60
    compiled.load_adapter(folder, "other")
    compiled.set_adapter("other")
    rehearsed.set_adapter("other")
    assert torch.equal(compiled(tokens()).logits, rehearsed(tokens()).logits)


@pytest.mark.parametrize("inplace", [False, True])
def test_compile(inplace: bool) -> None:
    base = llama(2)
    before, config = snapshot(base), base.config.to_dict()

    def run(given: nn.Module) -> Callable[[], object]:
        return lambda: lora_fx.compile(given, REPLICATED, backend="eager", inplace=inplace)

    failures = 0
    for step in steps_of_a_rehearsal(run(llama(2))):
        try:
            fail_at(run(base), step)
        except Injected:
            failures += 1
            assert_same(snapshot(base), before)
            assert base.config.to_dict() == config
    assert failures > 60


def disk(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("there", [False, True], ids=["new", "over one that is there"])
def test_save(there: bool, tmp_path: Path) -> None:
    compiled = model()
    compiled.load_adapter(saved(tmp_path / "one", MORE), "other")
    out = tmp_path / "runs" / "checkpoint-3"
    if there:
        changed(out, SPEC)
        (out / "trainer_state.json").write_text("{}")
    before, state = disk(tmp_path), snapshot(compiled)
    save = lambda: compiled.save_pretrained(out)  # noqa: E731
    rehearsed = tmp_path.parent / f"{tmp_path.name}-rehearsed"
    failures = 0
    for step in steps_of_a_rehearsal(lambda: compiled.save_pretrained(rehearsed / "checkpoint-3")):
        try:
            fail_at(save, step)
        except Injected:
            failures += 1
            assert disk(tmp_path) == before, step
            assert_same(snapshot(compiled), state)
        else:  # only tidying up failed
            assert disk(tmp_path) != before
            _put_back(tmp_path, before, there)
            before = disk(tmp_path)
    assert failures > 60


def _put_back(folder: Path, before: dict[str, str], there: bool) -> None:
    del folder, before, there
    pytest.fail("a failure was swallowed")
