"""Specs of several files as one: the same meaning, and the paths still name the same."""

from pathlib import Path

import pytest

from lora_fx.spec import parse
from lora_fx.spec.flat import flat_text
from lora_fx.spec.spec import Spec
from tests.spec.places import meaning

ROOT = """lora 1
# the root
include "parts/sql.lora"; include "parts/sql.lora"
let shared = "adapters/style"
adapter style { weights = shared }
adapter hub { weights = "someone/adapter" }
"""
PART = """lora 1
model "../base" { dtype = bfloat16 }
preset loaded { weights = "sql" }
adapter sql { use loaded  rank = 3  weights = "more/sql"  use loaded }
adapter absolute { weights = "/tmp" }
"""
FLAT = """lora 1

model "base" {
  dtype = bfloat16
}

preset loaded {
  weights = "parts/sql"
}

adapter sql {
  use loaded
  rank    = 3
  weights = "parts/more/sql"
  use loaded
}

adapter absolute {
  weights = "/tmp"
}

adapter style {
  weights = shared
}

adapter hub {
  weights = "someone/adapter"
}

let shared = "adapters/style"
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("base", "parts/sql", "parts/more/sql", "adapters/style", "out/deep"):
        (tmp_path / "spec" / folder).mkdir(parents=True)
    (tmp_path / "spec" / "parts" / "sql.lora").write_text(PART)
    (tmp_path / "spec" / "root.lora").write_text(ROOT)
    return tmp_path / "spec" / "root.lora"


def weights(spec: Spec) -> dict[str, str]:
    return {a.name: a.settings["weights"].value.span.text for a in spec.adapters}


def test_included_statements_stand_in_their_place(root: Path) -> None:
    text = flat_text(parse(root), root.parent)
    assert text == FLAT


def test_it_means_the_same_without_the_parts(root: Path) -> None:
    beside = root.parent / "parts" / "root.lora"  # where the part's paths need no change
    beside.write_text(ROOT.replace("parts/", "").replace("adapters/", "../adapters/"))
    spec = parse(beside)
    text = flat_text(spec, beside.parent)
    assert "include" not in text
    assert meaning(parse(text)) == meaning(spec)
    again = root.parent / "parts" / "again.lora"
    again.write_text(text)
    assert flat_text(parse(again), again.parent) == text


def test_paths_follow_into_another_folder(root: Path) -> None:
    deep = root.parent / "out" / "deep"
    moved = deep / "spec.lora"
    moved.write_text(flat_text(parse(root), deep))
    spec = parse(moved)
    assert spec.model is not None
    assert spec.model.path == "../../base"
    assert weights(spec) == {
        "sql": '"../../parts/sql"',
        "absolute": '"/tmp"',
        "style": '"../../adapters/style"',
        "hub": '"someone/adapter"',
    }


def test_a_text_that_needs_no_change_stays_as_it_is(root: Path) -> None:
    text = 'lora 1\n# kept\nadapter  a {target linear weights = "a/b"}'
    assert flat_text(parse(text), root.parent) == text


def test_json_is_of_one_file_too(root: Path) -> None:
    data = parse(root).to_json()
    assert "include" not in data
    assert data["model"] == {"path": "base", "dtype": "bfloat16"}
    assert data["presets"]["loaded"] == {"weights": {"text": "parts/sql"}}
    assert data["adapters"]["style"] == {"weights": "shared"}
