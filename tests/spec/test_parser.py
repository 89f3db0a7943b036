import time
from pathlib import Path

import pytest

from lora_fx.diagnostics import Diagnostic, Source
from lora_fx.spec import syntax
from lora_fx.spec.parser import parse_source
from lora_fx.spec.selectors import Selector

FILES = sorted((Path(__file__).parent / "files").glob("*.lora"))


def read(text: str) -> tuple[syntax.File | None, list[Diagnostic]]:
    return parse_source(Source("x.lora", text))


def statements(text: str) -> list[syntax.Statement]:
    file, faults = read(f"lora 1\n{text}")
    assert file is not None
    assert faults == []
    return list(file.statements)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_language_is_read_whole(path: Path) -> None:
    file, faults = read(path.read_text())
    assert faults == []
    assert file is not None
    assert file.statements


def test_line_breaks_and_semicolons_mean_nothing() -> None:
    spread = "let\na\n=\n1;let b=2 # let c = 3\n;adapter x{rank=1;target q;use p;}"
    let_a, let_b, adapter = statements(spread)
    assert isinstance(let_a, syntax.Let)
    assert isinstance(let_b, syntax.Let)
    assert isinstance(adapter, syntax.Adapter)
    assert [type(item) for item in adapter.items] == [syntax.Attribute, syntax.Target, syntax.Use]


def test_spans_are_those_of_the_text() -> None:
    (adapter,) = statements(
        'adapter "a-b" {\n  target? q, "*.v" in layers[..4] { rank = 2 * 3 }\n}'
    )
    assert isinstance(adapter, syntax.Adapter)
    (target,) = adapter.items
    assert isinstance(target, syntax.Target)
    assert isinstance(target.selector, Selector)
    assert adapter.span.text == 'adapter "a-b"'
    assert adapter.name.span.text == '"a-b"'
    assert target.span.text == 'target? q, "*.v" in layers[..4]'
    assert target.optional
    assert [atom.span.text for atom in target.selector.atoms] == ["q", '"*.v"']
    assert target.attributes[0].span.text == "rank = 2 * 3"
    assert target.attributes[0].value.span.text == "2 * 3"


def test_words_of_statements_are_names_elsewhere() -> None:
    (adapter,) = statements("adapter default { target model, layers, route except merge }")
    assert isinstance(adapter, syntax.Adapter)
    statements("compile { unit = layers } check model.config.layers > 1 adapter layers { }")


def test_a_backslash_quotes_quotes_only() -> None:
    (model,) = statements(r'model "C:\new\\\"x\""')
    assert isinstance(model, syntax.Model)
    assert model.path.text == r'C:\new\"x"'


def test_reading_goes_on_after_a_mistake() -> None:
    file, faults = read("lora 1\nlet a 1\nlet b = @\nadapter x { rank = ; target q }\nlet c = 3")
    assert [fault.span and fault.span.line for fault in faults] == [2, 3, 4]
    assert file is not None
    assert [type(s).__name__ for s in file.statements] == ["Let", "Adapter", "Let"]


def test_a_patch_does_not_move_later_places() -> None:
    _, faults = read("lora 1\nadapter x { rank 1 alpha 2 dropout }\nlet ä = 3")
    assert [(f.span.line, f.span.column) for f in faults if f.span] == [
        (2, 18),
        (2, 26),
        (2, 36),
        (3, 5),
    ]


@pytest.mark.parametrize(
    "value",
    [
        "(" * 50_000,
        "(" * 3_000 + "1" + ")" * 3_000,
        "-" * 100_000 + "1",
        "not " * 40_000 + "true",
        "if a then " * 20_000,
        "[" * 50_000,
        "min(" * 20_000,
        "1" + " + 1" * 50_000,
        "{" * 100_000,
        '"' * 100_001,
        "\0" * 100_000,
        "a." * 100_000,
    ],
    ids=lambda value: value[:6],
)
def test_time_and_depth_are_bounded(value: str) -> None:
    start = time.monotonic()
    _, faults = read(f"lora 1\nlet a = {value}")
    assert faults
    assert time.monotonic() - start < 20


def test_a_huge_file_is_refused() -> None:
    _, faults = read("lora 1\n" + "#" * 300_000)
    assert [fault.code for fault in faults] == ["file-too-large"]


def test_the_number_of_mistakes_told_is_bounded() -> None:
    _, faults = read("lora 1\n" + "let @\n" * 200)
    assert len(faults) == 20
