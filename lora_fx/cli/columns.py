"""Rows in columns that align, with headings between them that may be as wide as they like."""

from collections.abc import Container, Sequence

from rich.text import Text

Row = Sequence[Text | str]


def aligned(
    rows: Sequence[Row | Text], right: Container[int] = (), indent: int = 0, width: int = 1000
) -> list[Text]:
    """Return a line for each row; a heading, which is one Text, stands as it is.

    Columns whose numbers are in `right` end flush, the others begin so. Two blanks stand between
    columns, or one where the lines would be wider than `width`.
    """
    cells = [[_text(cell) for cell in row] for row in rows if not isinstance(row, Text)]
    widths = [max(text.cell_len for text in column) for column in zip(*cells, strict=True)]
    gap = 2 if indent + sum(widths) + 2 * (len(widths) - 1) <= width else 1
    lines = iter([_line(row, widths, right, indent, gap) for row in cells])
    return [row if isinstance(row, Text) else next(lines) for row in rows]


def _text(cell: Text | str) -> Text:
    return cell.copy() if isinstance(cell, Text) else Text(cell)


def _line(
    row: Sequence[Text], widths: Sequence[int], right: Container[int], indent: int, gap: int
) -> Text:
    line = Text(" " * indent)
    for column, (text, width) in enumerate(zip(row, widths, strict=True)):
        blanks = " " * (width - text.cell_len)
        parts = (blanks, text) if column in right else (text, blanks)
        line.append_text(Text.assemble(*parts, " " * gap))
    line.rstrip()
    return line
