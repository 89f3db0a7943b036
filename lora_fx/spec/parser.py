"""Text to syntax tree.

An error does not end the reading: the text is patched where a patch makes sense of it, or the
statement is blanked out, and it is read again, so that every mistake of a file is reported.
"""

from dataclasses import replace
from typing import Any

from lark import Tree, UnexpectedInput

from lora_fx.diagnostics import Diagnostic, Source, Span
from lora_fx.spec.builder import build, oversized
from lora_fx.spec.grammar import grammar
from lora_fx.spec.patched import Patched
from lora_fx.spec.syntax import File
from lora_fx.spec.syntax_errors import explain

_MOST_CHARACTERS = 250_000
_MOST_CHARACTERS_TO_RECOVER = 20_000
_MOST_ERRORS = 20


def parse_source(source: Source) -> tuple[File | None, list[Diagnostic]]:
    """Return the syntax tree of what can be read of a file, and everything that is wrong.

    Time and memory are bounded: there is a limit to a file's size and to an expression's depth.
    """
    if diagnostic := too_large(source):
        return None, [diagnostic]
    tree, patched, diagnostics, whole = _read(source)
    if tree is None:
        return None, diagnostics
    part = oversized(tree)
    if part is not None:
        span = patched.span(part.meta.start_pos, part.meta.end_pos)
        message = "the expression is nested too deeply or too long"
        return None, [*diagnostics, Diagnostic("expression-too-large", message, span)]
    file, more = build(tree, patched.span)
    return replace(file, whole=whole), diagnostics + more


def too_large(source: Source) -> Diagnostic | None:
    """Return what is wrong with a file whose size alone is a mistake."""
    if len(source.text) <= _MOST_CHARACTERS:
        return None
    message = f"the file is longer than {_MOST_CHARACTERS} characters"
    return Diagnostic("file-too-large", message, Span(source, 0, 0))


def _read(source: Source) -> tuple[Tree[Any] | None, Patched, list[Diagnostic], bool]:
    patched = Patched(source, source.text, tuple(range(len(source.text) + 1)))
    diagnostics: list[Diagnostic] = []
    whole = True
    while True:
        try:
            return grammar().parse(patched.text), patched, diagnostics, whole
        except UnexpectedInput as error:
            correction = explain(error, patched, grammar())
            diagnostics.append(correction.diagnostic)
            if len(diagnostics) == _MOST_ERRORS or len(source.text) > _MOST_CHARACTERS_TO_RECOVER:
                return None, patched, diagnostics, False
            whole = whole and correction.whole
            patched = patched.replace(correction.start, correction.end, correction.text)
