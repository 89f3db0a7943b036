"""How marks are laid out: one golden text for each case, and what holds for any spans."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from lora_fx.diagnostics import Diagnostic, Source, Span, render
from lora_fx.diagnostics.visible import visible
from tests.golden import assert_golden

HERE = Path(__file__).parent
SPEC = Source(
    "spec.lora",
    """\
lora 1
adapter sql {
\trank = 8
  target q_proj, k_proj where rank > 3
  dropout = 0.5
}
let 模型 = 3 + 模型
let a = 1
let b = 2
let c = 3
let d = 4
let e = 5
preset p { alpha = 1
  rank = 4 } # last
""",
)
LONG = Source("long.lora", "let a = " + " + ".join(f"value_{i}" for i in range(60)))


def span(text: str, to: str = "", source: Source = SPEC) -> Span:
    start = source.text.index(text)
    return Span(source, start, source.text.index(to, start) + len(to) if to else start + len(text))


def long(text: str) -> Span:
    return span(text, source=LONG)


CASES: dict[str, tuple[tuple[Span, str], ...]] = {
    "three-on-one-line": (
        (span("k_proj"), "the primary"),
        (span("q_proj"), "one before"),
        (span("rank > 3"), "one\nbehind"),
    ),
    "one-in-another": (
        (span("rank >"), "the inner"),
        (span("where", "3"), "the outer"),
        (span("target"), ""),
    ),
    "last-without-label": ((span("rank > 3"), ""), (span("q_proj"), "the other")),
    "the-same-place": ((span("q_proj"), "the primary"), (span("q_proj"), "the other")),
    "a-block": ((span("adapter", "}"), "all of it"), (span("rank = 8"), "a line of it")),
    "from-within-a-line": ((span("sql {", "dropout"), "all of it"), (span("let c"), "far off")),
    "two-brackets": ((span("adapter", "}"), "the outer"), (span("{", "k_proj"), "the inner")),
    "two-brackets-apart": ((span("sql {", "q_proj"), ""), (span("p {", "}"), "later")),
    "a-long-block": ((span("{", "let d"), "all of it"), (span("let a"), "a line of it")),
    "a-gap-of-one-line": ((span("let a"), "first"), (span("let c"), "third")),
    "wide-characters": ((span(" + 模型"), "adds"), (span("模型"), "defined")),
    "far-apart-on-a-long-line": (
        (long("value_50"), "here"),
        (long("value_2 "), "there"),
        (long("value_52"), "close by"),
    ),
    "longer-than-the-screen": ((Span(LONG, 4, len(LONG.text)), "all of it"),),
    "the-end-of-a-long-line": ((Span(LONG, len(LONG.text), len(LONG.text)), "more to come"),),
    "the-end-of-the-file": ((Span(SPEC, len(SPEC.text), len(SPEC.text)), "`}` is missing"),),
    "long-labels": (
        (span("k_proj"), "a label that is too long to stand beside what it marks on this terminal"),
        (span("rank > 3"), "this one is too long for one line even below, since it begins so far"),
        (span("target"), "short"),
    ),
    "two-files": ((span("rank"), "here"), (long("let a"), "there"), (span("let b"), "here too")),
}


@pytest.mark.parametrize("name", CASES)
def test_layout(name: str) -> None:
    (primary, label), *others = CASES[name]
    diagnostic = Diagnostic(name, "it stands there", primary, label, tuple(others))
    assert_golden(HERE / "layout" / f"{name}.expect", render([diagnostic], width=80))


LABELS = st.text(st.sampled_from("ab 模\x1b"), max_size=20)
TEXTS = st.text(st.sampled_from("ab {}\t模é́\x1b\u202e"), min_size=1, max_size=30)


@given(TEXTS, st.data())
def test_carets_stand_under_what_they_mark(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    marked = Span(Source("x", text), start, end)
    row = render([Diagnostic("c", "m", marked)]).splitlines()[-1].removeprefix("  | ")
    assert len(row) - row.count("^") == cell_len(visible(text[:start]))
    assert row.count("^") == max(cell_len(visible(marked.text)), 1)


@given(
    st.text(st.sampled_from("ab \n\t模\x1b"), max_size=300),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), LABELS), min_size=1, max_size=5),
    st.integers(50, 90),
)
def test_any_spans_can_be_shown(text: str, places: list[tuple[int, int, str]], width: int) -> None:
    source = Source("x", text)
    spans = []
    for start, length, label in places:
        start = min(start, len(text))
        spans.append((Span(source, start, min(start + length, len(text))), label))
    (primary, label), *others = spans
    shown = render([Diagnostic("c", "m", primary, label, tuple(others))], width)
    assert all(visible(label).strip() in shown for _, label in spans)
    assert "\x1b" not in shown
    rows = [row for row in shown.splitlines() if row.lstrip()[:1].isdigit()]
    assert rows
    assert max(map(cell_len, rows)) <= width
