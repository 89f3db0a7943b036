"""Data that is not of the form is refused as a whole, each fault at its place."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fx.diagnostics import LoraFxError, render
from lora_fx.spec import parse
from lora_fx.spec.json_form.fragments import fragment_faults
from tests.golden import assert_golden
from tests.spec.json_form.valid import VALIDATOR

HERE = Path(__file__).parent
WRONG: dict[str, Any] = {
    "adaptors": {},
    "include": "a.lora",
    "let": {"a b": 3, "c": None, "d": {"text": 3}, "e": [1, [float("nan")]]},
    "model": {"dtype": "auto", "path": "two\nlines"},
    "layers": {"replicate": ["0..4", "4-8", True]},
    "quantize": [{"method": "nf4"}, "linear"],
    "adapters": {
        "one": {
            "rnk": 8,
            "rank": "2 *",
            "use": ["a", 3, {"alpha": "16 dropout = 3"}],
            "targets": ["linear { rank = 3 }", {"select": "q_proj", "optional": "yes"}, 5],
            "tokens": [{"ids": "[1]"}, {"ids": [1], "in": "a, b"}],
        },
        "two words": 3,
    },
    "route": {"when": {"x": 0.5}, "default": "a b"},
    "merges": {"m": {"method": "cat"}},
    "checks": [{"message": "no condition"}],
    "compile": {"entries": {"train": [8, 9]}},
}


def faults(data: Any) -> str:
    with pytest.raises(LoraFxError) as raised:
        parse(data)
    return render(raised.value.diagnostics)


def test_everything_that_is_wrong_at_once() -> None:
    assert_golden(HERE / "wrong.expect", faults(WRONG))


def test_meaning_is_checked_as_in_a_file() -> None:
    text = faults(
        {
            "lora": 1,
            "adapters": {"a": {"rank": "2 * rnk", "targets": [{"select": "linear", "rank": 0}]}},
        }
    )
    assert "error[unknown-name]: `rnk` is not known\n --> <data>:4:14" in text
    assert "error[wrong-value]: `rank` must be a whole number of at least 1" in text


@pytest.mark.parametrize("version", ["1", None, True, 1.0, -1])
def test_the_version(version: Any) -> None:
    assert "`$.lora` must be the version of the language" in faults({"lora": version})
    assert "error[unsupported-version]" in faults({"lora": 2})
    assert "`$` needs `lora`" in faults({})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("expression", "8 rank = 9"),
        ("expression", "8) let y = (9"),
        ("expression", "8; let y = 9"),
        ("expression", ""),
        ("expression", "# nothing"),
        ("expression", "1" * 30),
        ("expression", "-" * 100 + "1"),
        ("selector", "linear { rank = 3 }"),
        ("selector", "linear } quantize up_proj {"),
        ("selector", "linear { } quantize up_proj"),
        ("pattern", "a, b"),
        ("pattern", "a in layers[3]"),
        ("pattern", "a tokens [1] in b"),
        ("pattern", "a } adapter y { train b"),
        ("mix", "a rank = svd(3)"),
        ("mix", "a + b } merge y { from c"),
    ],
)
def test_a_string_holds_one_part_and_nothing_else(kind: Any, text: str) -> None:
    found = fragment_faults(kind, text, "$.here")
    assert found
    for diagnostic in found:
        assert diagnostic.span is not None
        assert diagnostic.span.source.name == "$.here"


def test_files_that_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text('{"lora": 1,\n "let" {}}')
    message = "this is no JSON: Expecting ':' delimiter"
    assert f"error[wrong-json]: {message}\n --> {path}:2:8" in faults(path)
    path.write_text('{"lora": 1, "let": {"a": 1, "a": 2}}')
    assert 'the key "a" stands twice in one object' in faults(path)
    path.write_text("[" * 100_000)
    assert "error[wrong-json]: this JSON cannot be read" in faults(path)
    path.write_text("[1]")
    assert "`$` must be a mapping; it is `[1]`" in faults(path)


_plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(WRONG)), _plain)
def test_any_data_is_read_or_refused(key: str, value: Any) -> None:
    data = {"lora": 1, key: value}
    refused = None
    try:
        parse(data)
    except LoraFxError as error:
        refused = render(error.diagnostics)
    assert refused or VALIDATOR.is_valid(data)
