import json
import os
from pathlib import Path

import pytest
from torch import nn

import lora_fx
from lora_fx.diagnostics import LoraFxError
from lora_fx.plan.lock import from_json, lock_of
from lora_fx.plan.lock_file import read_lock, write_lock
from tests.plan.models import Tower
from tests.tiny import llama

TEXT = """lora 1
include "presets.lora"
quantize head { method = int8 }
adapter x {
  rank = if layer.index < 10 then 2 else 1
  target up, down
  target up { rank = 3 }
  target up
  train norm in layers[1..]
}
adapter y { use small  target head }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.lora").write_text(TEXT)
    Path("presets.lora").write_text("lora 1 preset small { rank = 1 }")


def notes(model: nn.Module) -> list[str]:
    return [d.message for d in lora_fx.plan("a.lora", model).notes if d.code == "lock-differs"]


def test_what_a_lock_holds() -> None:
    lock = json.loads(write_lock(lora_fx.plan("a.lora", Tower(12))).read_text())
    assert set(lock["files"]) == {"a.lora", "presets.lora"}
    assert lock["quantize"] == [{"rule": "quantize head", "matches": ["head"]}]
    x = lock["adapters"]["x"]
    assert [rule["rule"] for rule in x["rules"]] == [
        *("target up, down", "target up", "target up", "train norm in layers[1..]")
    ]
    assert x["rules"][0]["matches"] == ["blocks.{0..11}.down", "blocks.{0..11}.up"]
    assert x["ranks"] == {
        "blocks.{0..11}.up": 3,
        "blocks.{0..9}.down": 2,
        "blocks.{10..11}.down": 1,
    }


def test_a_lock_reads_back() -> None:
    plan = lora_fx.plan("a.lora", Tower(12))
    lock = lock_of(plan)
    assert from_json(json.loads(json.dumps(lock.to_json()))) == lock
    write_lock(plan)
    assert read_lock(plan.spec) == lock


def test_the_same_plan_writes_the_same_bytes_from_anywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = write_lock(lora_fx.plan("a.lora", Tower(12))).read_bytes()
    there = Path(Path.cwd().name) / "a.lora"
    monkeypatch.chdir("..")
    assert write_lock(lora_fx.plan(there, Tower(12))).read_bytes() == first


def test_nothing_is_said_where_nothing_differs() -> None:
    write_lock(lora_fx.plan("a.lora", Tower(12)))
    Path("a.lora").write_text("# a comment\n" + TEXT)
    assert notes(Tower(12)) == []
    assert lora_fx.plan(TEXT, Tower(12)).notes == ()


def test_what_is_said_where_something_differs() -> None:
    write_lock(lora_fx.plan("a.lora", Tower(12)))
    deeper = lora_fx.plan("a.lora", Tower(13)).notes
    assert [d.severity for d in deeper] == ["warning"] * 4
    assert deeper[0].notes == ("came: `blocks.12.down`, `blocks.12.up`",)
    assert deeper[0].span is not None
    assert deeper[0].span.line == 6
    Path("presets.lora").write_text("lora 1 preset small { rank = 2 }")
    (rank,) = lora_fx.plan("a.lora", Tower(12)).notes
    assert rank.message == "adapter `y` has other ranks than the lock says"
    assert rank.notes == ("rank 1 became 2: `head`", "`presets.lora` has changed since")


def test_a_rule_that_is_written_twice_is_two_rules() -> None:
    write_lock(lora_fx.plan("a.lora", Tower(12)))
    Path("a.lora").write_text(TEXT.replace("  target up\n", ""))
    assert notes(Tower(12)) == ["`target up` of adapter `x` is in the lock, and not in the spec"]


def test_a_model_is_told_by_class_and_config() -> None:
    Path("a.lora").write_text("lora 1 adapter x { target up_proj }")
    live, config = llama(2), llama(2).config
    assert lock_of(lora_fx.plan("a.lora", live)) == lock_of(lora_fx.plan("a.lora", config))
    wider = llama(2, vocab_size=103)
    assert lock_of(lora_fx.plan("a.lora", wider)) != lock_of(lora_fx.plan("a.lora", live))
    write_lock(lora_fx.plan("a.lora", live))
    assert notes(wider) == []
    assert notes(llama(3)) != []


def test_compiling_says_it_too() -> None:
    Path("a.lora").write_text("lora 1 adapter x { target up_proj }")
    write_lock(lora_fx.plan("a.lora", llama(2)))
    model = lora_fx.compile(llama(3), "a.lora", backend=None)
    assert [note.code for note in model.lora_fx_plan.notes] == ["lock-differs"]


def test_a_new_lock_can_be_read_by_others() -> None:
    umask = os.umask(0o022)
    try:
        path = write_lock(lora_fx.plan("a.lora", Tower(12)))
        assert path.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(umask)


def test_a_text_has_no_place_for_a_lock() -> None:
    with pytest.raises(LoraFxError) as raised:
        write_lock(lora_fx.plan("lora 1 adapter x { rank = 1 target up }", Tower()))
    assert raised.value.diagnostics[0].code == "unwritable-file"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"lock": 2}', '{"lock": 1, "quantize": 3, "adapters": {}}']
)
def test_what_is_no_lock(text: str) -> None:
    Path("a.lora.lock").write_text(text)
    (note,) = lora_fx.plan("a.lora", Tower(12)).notes
    assert (note.code, note.severity) == ("bad-lock", "warning")
