"""What holds of every program, and of every text that was one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fx.diagnostics import Diagnostic, LoraFxError, render
from lora_fx.spec import parse
from tests.spec.programs import programs

_JUNK = st.sampled_from(
    [
        *"{}[]()=,;\"'@#?*-.%<>!\\\n\t\0é",
        *("rank", "target", "adapter", "let", "if", "then", "else", "not", "and", "base", "linear"),
        *("0", "..", "1e999", "lora 1", "in layers[", "where", '"a"'),
    ]
)


def mistakes(text: str) -> tuple[Diagnostic, ...]:
    """What is wrong with a text; an exception of any other kind is a bug."""
    try:
        parse(text)
    except LoraFxError as error:
        return error.diagnostics
    return ()


@settings(max_examples=150, deadline=None)
@given(programs())
def test_right_programs_are_read(text: str) -> None:
    spec = parse(text)
    assert spec.source.text == text
    assert len(spec.adapters) == text.count("adapter ")


@settings(max_examples=300, deadline=None)
@given(programs(), st.data())
def test_any_text_is_read_or_refused_at_places_inside_it(text: str, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(start + 12, len(text))))
        text = text[:start] + data.draw(st.one_of(st.just(""), _JUNK)) + text[end:]
    text = f"\n{text}"
    for diagnostic in mistakes(text):
        assert diagnostic.span is not None
        assert 0 <= diagnostic.span.start <= diagnostic.span.end <= len(text)
        assert render([diagnostic], width=40)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_at_all(text: str) -> None:
    mistakes(f"{text}\n")
