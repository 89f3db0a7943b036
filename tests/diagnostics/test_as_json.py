import json

from lora_fx.diagnostics import Diagnostic, Source, Span, to_json

SOURCE = Source("spec.lora", "lora 1\nlet 模型 = 1\nlet 模型 = 2\n")
PLAIN = {
    "code": "no-model",
    "severity": "note",
    "message": "there is none",
    "label": "",
    "span": None,
    "secondary": [],
    "notes": [],
    "help": None,
}


def test_everything_is_there() -> None:
    again, first = Span(SOURCE, 22, 24), Span(SOURCE, 11, 17)
    assert (again.text, first.text) == ("模型", "模型 = 1")
    diagnostics = [
        Diagnostic(
            "duplicate-name",
            "constant `模型` is there already",
            again,
            "again",
            ((first, "the first one"),),
            ("in one file",),
            "give it another name",
        ),
        Diagnostic("no-model", "there is none", severity="note"),
    ]
    named, plain = json.loads(json.dumps(to_json(diagnostics)))["diagnostics"]
    assert plain == PLAIN
    assert named == {
        "code": "duplicate-name",
        "severity": "error",
        "message": "constant `模型` is there already",
        "label": "again",
        "span": {
            "file": "spec.lora",
            "start": {"line": 3, "column": 5, "offset": 22},
            "end": {"line": 3, "column": 7, "offset": 24},
        },
        "secondary": [
            {
                "label": "the first one",
                "span": {
                    "file": "spec.lora",
                    "start": {"line": 2, "column": 5, "offset": 11},
                    "end": {"line": 2, "column": 11, "offset": 17},
                },
            }
        ],
        "notes": ["in one file"],
        "help": "give it another name",
    }


def test_spans_of_several_lines() -> None:
    (one,) = to_json([Diagnostic("c", "m", Span(SOURCE, 7, 29))])["diagnostics"]
    assert one["span"]["start"] == {"line": 2, "column": 1, "offset": 7}
    assert one["span"]["end"]["line"] == 3
