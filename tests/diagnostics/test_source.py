import pytest

from lora_fx.diagnostics import Source, Span

TEXT = "lora 1\nadapter default {\n\ttarget q_prj\n}\n"
SOURCE = Source("spec.lora", TEXT)


@pytest.mark.parametrize(
    ("offset", "line", "column"),
    [(0, 1, 1), (5, 1, 6), (6, 1, 7), (7, 2, 1), (len(TEXT), 5, 1)],
)
def test_lines_and_columns_count_from_one(offset: int, line: int, column: int) -> None:
    place = Span(SOURCE, offset, offset)
    assert (place.line, place.column) == (line, column)
    assert (place.last_line, place.end_column) == (line, column)


def test_the_end_is_behind_the_last_character() -> None:
    block = Span(SOURCE, 7, len(TEXT) - 1)
    assert (block.line, block.column, block.last_line, block.end_column) == (2, 1, 4, 2)
    word = Span(SOURCE, 7, 14)
    assert (word.text, word.last_line, word.end_column) == ("adapter", 2, 8)


def test_a_line_is_without_its_end() -> None:
    source = Source("x", "ab\r\ncd\n")
    assert [source.line(n) for n in (1, 2, 3)] == ["ab", "cd", ""]
    assert Source("x", "").line(1) == ""
