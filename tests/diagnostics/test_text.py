import pickle
import traceback

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source, Span, render

TEXT = "lora 1\nadapter default {\n\ttarget q_prj\n}\n"
SOURCE = Source("spec.lora", TEXT)


def span(text: str, source: Source = SOURCE) -> Span:
    start = source.text.index(text)
    return Span(source, start, start + len(text))


def shown(diagnostic: Diagnostic, width: int | None = None) -> str:
    return "\n" + render([diagnostic], width) + "\n"


def test_everything_at_once() -> None:
    diagnostic = Diagnostic(
        "unmatched-target",
        "`q_prj` matches no module",
        span("q_prj"),
        "matched 0 of 6",
        secondary=((span("default"), "in this adapter"),),
        notes=("modules are counted once",),
        help="did you mean `q_proj`?",
    )
    assert (
        shown(diagnostic)
        == """
error[unmatched-target]: `q_prj` matches no module
 --> spec.lora:3:9
  |
2 | adapter default {
  |         ------- in this adapter
3 |     target q_prj
  |            ^^^^^ matched 0 of 6
  = note: modules are counted once
  = help: did you mean `q_proj`?
"""
    )


def test_places_apart_and_in_other_files() -> None:
    other = Source("base.lora", "lora 1\nlet a = 3")
    source = Source("spec.lora", "\n" * 8 + "let a = 4\n\n\nlet b = a")
    diagnostic = Diagnostic(
        "duplicate-name",
        "`a` is there already",
        span("a", source),
        secondary=((span("b = a", source), "used here"), (span("a = 3", other), "the first")),
        severity="warning",
    )
    assert (
        shown(diagnostic)
        == """
warning[duplicate-name]: `a` is there already
  --> spec.lora:9:5
   |
 9 | let a = 4
   |     ^
...
12 | let b = a
   |     ----- used here
   |
  ::: base.lora:2:5
   |
 2 | let a = 3
   |     ----- the first
"""
    )


def test_marks_stand_under_wide_characters() -> None:
    source = Source("x", 'model "模型" rank')
    assert (
        shown(Diagnostic("c", "m", span("rank", source)))
        == """
error[c]: m
 --> x:1:12
  |
1 | model "模型" rank
  |              ^^^^
"""
    )


def test_a_long_line_is_cut_to_a_window_around_the_mark() -> None:
    source = Source("x", "a" * 500 + "HERE" + "b" * 500)
    line, mark = shown(Diagnostic("c", "m", span("HERE", source)), width=60).splitlines()[4:]
    assert len(line) <= 62
    assert line[mark.index("^") : mark.rindex("^") + 1] == "HERE"


def test_control_characters_never_reach_the_terminal() -> None:
    source = Source("x\x1b[31m", 'model "\x1b[2J\u202e"')
    diagnostic = Diagnostic("c", "m\x07", span("model", source), "\x1b", notes=("\x00",))
    assert not set(render([diagnostic])) & set("\x1b\x07\x00\u202e")


def test_without_a_place() -> None:
    assert render([Diagnostic("no-model", "there is none", help="pass one")]) == (
        "error[no-model]: there is none\n  = help: pass one"
    )


def test_only_other_places() -> None:
    diagnostic = Diagnostic("c", "m", secondary=((span("default"), "named here"),))
    assert (
        shown(diagnostic)
        == """
error[c]: m
 --> spec.lora:2:9
  |
2 | adapter default {
  |         ------- named here
"""
    )


def test_colour_only_when_asked() -> None:
    diagnostics = [Diagnostic("c", "m", span("q_prj")), Diagnostic("d", "n")]
    plain, coloured = render(diagnostics), render(diagnostics, color=True)
    assert "\x1b[" not in plain
    assert "\x1b[1;31merror[c]\x1b[0m" in coloured
    assert plain.count("\n\n") == 1


def test_the_error_shows_and_keeps_all() -> None:
    diagnostics = (Diagnostic("c", "m", span("q_prj")), Diagnostic("d", "n"))
    error = LoraFxError(list(diagnostics))
    assert error.diagnostics == diagnostics
    assert str(error) == "\n" + render(diagnostics)
    assert pickle.loads(pickle.dumps(error)).diagnostics == diagnostics
    shown_last = traceback.format_exception_only(error)[-1]
    assert shown_last.startswith("lora_fx.LoraFxError: \nerror[c]: m\n")


def test_sentences_are_broken_at_the_edge_of_a_terminal() -> None:
    diagnostic = Diagnostic(
        "c",
        "a sentence that has not enough room on one line",
        notes=("two lines\nof a reason that is not one of ours",),
    )
    assert (
        shown(diagnostic, width=40)
        == """
error[c]: a sentence that has not enough
          room on one line
  = note: two lines
          of a reason that is not one of
          ours
"""
    )
    assert max(map(len, shown(diagnostic).splitlines())) > 40
