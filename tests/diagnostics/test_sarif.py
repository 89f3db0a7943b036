from typing import Any

import jsonschema
import pytest

import lora_fx
from lora_fx.diagnostics import Diagnostic, LoraFxError, Source, Span, to_sarif
from lora_fx.diagnostics.pages import codes, page
from tests.diagnostics.sarif_schema import LOG

SPEC = """lora 1
let a = 1
let a = 2
adapter default {
  rnk = 3
  target linear where rank
}
"""


def log(*diagnostics: Diagnostic) -> Any:
    made = to_sarif(diagnostics)
    jsonschema.validate(made, LOG)
    return made


def test_a_whole_log() -> None:
    with pytest.raises(LoraFxError) as raised:
        lora_fx.parse(SPEC)
    (run,) = log(*raised.value.diagnostics)["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "lora_fx"
    rules = [rule["id"] for rule in driver["rules"]]
    assert rules == ["duplicate-name", "name-not-available", "unknown-attribute"]
    assert driver["rules"][0]["help"]["markdown"] == page("duplicate-name").text
    assert all(rules[result["ruleIndex"]] == result["ruleId"] for result in run["results"])
    assert [result["level"] for result in run["results"]] == ["error"] * 3
    again, misspelt, _ = run["results"]
    assert again["locations"][0]["physicalLocation"]["region"] == {
        "startLine": 3,
        "startColumn": 5,
        "endLine": 3,
        "endColumn": 6,
        "charOffset": 21,
        "charLength": 1,
    }
    (first,) = again["relatedLocations"]
    assert first["physicalLocation"]["region"]["startLine"] == 2
    assert first["message"]["text"] == "the first one"
    assert misspelt["message"]["text"] == (
        "there is no attribute `rnk`\nhelp: did you mean `rank`?"
    )


def test_labels_and_notes_are_part_of_the_message() -> None:
    span = Span(Source("a.lora", "lora 1"), 0, 4)
    diagnostic = Diagnostic(
        "wrong-value", "too small", span, "is 0", notes=("and so on",), severity="warning"
    )
    (result,) = log(diagnostic)["runs"][0]["results"]
    assert result["message"]["text"] == "too small: is 0\nnote: and so on"
    assert result["level"] == "warning"


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("specs/a b.lora", "specs/a%20b.lora"),
        ("/specs/模.lora", "file:///specs/%E6%A8%A1.lora"),
        ("<text>", "%3Ctext%3E"),
        ("../a.lora", "../a.lora"),
        ("a:b.lora", "a%3Ab.lora"),
    ],
)
def test_files_are_uris(name: str, uri: str) -> None:
    diagnostic = Diagnostic("wrong-value", "m", Span(Source(name, "lora 1"), 0, 4))
    (location,) = log(diagnostic)["runs"][0]["results"][0]["locations"]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == uri


def test_without_a_place_and_without_a_fault() -> None:
    assert log(Diagnostic("no-model", "none"))["runs"][0]["results"][0]["locations"] == []
    assert log()["runs"][0]["results"] == []


def test_every_code_can_be_a_rule() -> None:
    rules = log(*(Diagnostic(code, "m") for code in codes()))["runs"][0]["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == codes()
