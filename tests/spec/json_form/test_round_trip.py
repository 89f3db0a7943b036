"""Text → spec → JSON → spec: the same meaning, and the same JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

import lora_fx
from lora_fx.spec import parse
from tests.spec.json_form.valid import assert_valid
from tests.spec.places import meaning
from tests.spec.programs import programs
from tests.tiny import llama

FILES = Path(__file__).parent.parent / "files"
EVERYTHING = r"""lora 1
let half = (1 / 2)   # a constant
let folder = "a \"b\" # \\ c"
model "org/model" { revision = folder }
layers { replicate 0..4, 8.., 7 drop ..2, 3 of = "model.layers" share = nothing }
quantize linear except lm_head, class "X" { method = int8(5.5) }
quantize o_proj { method = nf4 }
preset small { rank = 2 }
preset wide { rank = 9 alpha = -3.5 }
adapter "zephyr-7b" {
  use small  rank = 3 alpha = 1  use wide  dropout = 2.5%
  variant = bdlora(a = ["q_proj"], blocks = 2)
  target? linear, "a.**.{b,c}" except q_proj in layers[..4,
    8] where module.name == "x  y" and # why
    not (layer.index == 3 or layer.index > 5)
  target regex "a\.(b|c)" { rank = (rank_of + 2) * 3  init = loftq(bits = 4) }
  target parameter "**.experts.down_proj" in layers of "model.layers"[2..3] where true where false
  train? lm_head
  train "model.norm" where module.class == "Norm"
  tokens [0, 2 + 3]
  tokens [1] in "model.embed_tokens"
}
let rank_of = if half < 1 then 4 else 5
adapter plain { weights = folder  bias = all  trainable = true }
route {
  by = argument("names")  train = true
  when "x \"y\"" -> -0.5 * plain + (1 - half) * "zephyr-7b"
  default -> plain
}
merge both { from plain - 30% * "zephyr-7b"  method = dare_ties(density = half)  save = "out" }
optimizer { name = sgd  lr = 1e-5  momentum = 90% }
check sites > 3 : "not \"few\""
check not (memory < 1e9)
compile {
  mode = "max-autotune-no-cudagraphs"; unit = layers  dynamic = false  checkpoint = budget(0.5)
  entry forward { batch = 2 sequence = 3 * 4 }
}
"""


def round_trip(text: str | Path) -> dict[str, Any]:
    spec = parse(text)
    data = spec.to_json()
    assert json.loads(json.dumps(data)) == data
    assert_valid(data)
    again = parse(data)
    assert meaning(again) == meaning(spec)
    assert again.to_json() == data
    return data


@pytest.mark.parametrize("path", sorted(FILES.glob("*.lora")), ids=lambda path: path.stem)
def test_files(path: Path) -> None:
    round_trip(path)


@settings(max_examples=100, deadline=None)
@given(programs())
def test_programs(text: str) -> None:
    round_trip(text)


def test_every_statement() -> None:
    data = round_trip(EVERYTHING)
    assert list(data) == [
        *("lora", "let", "model", "layers", "quantize", "presets", "adapters", "route", "merges"),
        *("optimizer", "checks", "compile"),
    ]
    assert data["let"] == {
        "half": "1 / 2",
        "folder": {"text": 'a "b" # \\ c'},
        "rank_of": "if half < 1 then 4 else 5",
    }
    assert data["layers"] == {
        "replicate": ["0..4", "8..", "7"],
        "drop": ["..2", "3"],
        "of": {"text": "model.layers"},
        "share": "nothing",
    }
    assert data["adapters"]["zephyr-7b"] == {
        "use": ["small", {"rank": 3}, {"alpha": 1}, "wide"],
        "dropout": 0.025,
        "variant": 'bdlora(a = ["q_proj"], blocks = 2)',
        "targets": [
            {
                "select": 'linear, "a.**.{b,c}" except q_proj in layers[..4, 8] where module.name'
                ' == "x  y" and not (layer.index == 3 or layer.index > 5)',
                "optional": True,
            },
            {
                "select": r'regex "a\.(b|c)"',
                "rank": "(rank_of + 2) * 3",
                "init": "loftq(bits = 4)",
            },
            'parameter "**.experts.down_proj" in layers of "model.layers"[2..3] where true'
            " where false",
        ],
        "train": [
            {"select": "lm_head", "optional": True},
            '"model.norm" where module.class == "Norm"',
        ],
        "tokens": [[0, "2 + 3"], {"ids": [1], "in": '"model.embed_tokens"'}],
    }
    assert data["route"] == {
        "by": 'argument("names")',
        "train": True,
        "when": {'x "y"': '-0.5 * plain + (1 - half) * "zephyr-7b"'},
        "default": "plain",
    }
    assert data["checks"] == [
        {"condition": "sites > 3", "message": 'not "few"'},
        "not (memory < 1e9)",
    ]
    assert data["compile"]["entries"] == {"forward": {"batch": 2, "sequence": "3 * 4"}}


def test_the_values() -> None:
    text = "let a = true let b = -2 let c = 0.5 let d = [1, \"x\", gaussian] let e = 'x'"
    data = parse(f"lora 1\n{text}".replace("'", '"')).to_json()
    assert data["let"] == {
        **{"a": True, "b": -2, "c": 0.5},
        **{"d": [1, {"text": "x"}, "gaussian"], "e": {"text": "x"}},
    }


def test_short_and_long_forms_are_one() -> None:
    short = {"model": "m", "adapters": {"a": {"targets": ["linear"], "train": ["n"]}}}
    long = {
        "model": {"path": "m"},
        "adapters": {"a": {"targets": [{"select": "linear"}], "train": [{"select": "n"}]}},
    }
    tokens = (
        {"adapters": {"a": {"tokens": [(1, 2)]}}},
        {"adapters": {"a": {"tokens": [{"ids": [1, 2]}]}}},
    )
    checks = {"checks": ["sites > 3", False]}, {"checks": [{"condition": "sites > 3"}, "false"]}
    for one, other in ((short, long), tokens, checks):
        specs = [parse({"lora": 1, **data}) for data in (one, other)]
        assert meaning(specs[0]) == meaning(specs[1])
        assert specs[0].to_json() == specs[1].to_json()


def test_data_is_planned_and_compiled_as_a_file_is() -> None:
    data = {"lora": 1, "adapters": {"a": {"rank": 3, "targets": ["up_proj"]}}}
    assert len(lora_fx.plan(data, llama(2)).sites) == 2
    assert len(lora_fx.compile(llama(2), data, backend=None).lora_fx_plan.sites) == 2


def test_files_of_json(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"lora": 1, "adapters": {"a": {"targets": ["linear"]}}}))
    spec = parse(path)
    assert (spec.path, spec.adapters[0].name) == (path, "a")
    assert spec.source.name == f"{path} as .lora"


def test_includes_are_read_from_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.lora").write_text("lora 1 adapter a { target linear }")
    path = tmp_path / "spec.json"
    path.write_text('{"lora": 1, "include": ["a.lora"]}')
    assert [adapter.name for adapter in parse(path).adapters] == ["a"]
