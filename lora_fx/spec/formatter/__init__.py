"""Text to the same text in the canonical style.

Only blanks, line breaks, `;` that say nothing and commas before a closing bracket change: the
syntax tree stays, comments stay in their order, texts in quotes are never touched, and formatting
twice is formatting once.

    text ── Lark ──► tokens, tree ──► pieces ──► statements ──► lines ──► text
"""

from lark import UnexpectedInput

from lora_fx.diagnostics import LoraFxError, Source
from lora_fx.spec.formatter.layout import file_lines
from lora_fx.spec.formatter.lines import text_of
from lora_fx.spec.formatter.pieces import read_pieces
from lora_fx.spec.formatter.statements import read_statements, starts
from lora_fx.spec.grammar import grammar
from lora_fx.spec.parser import parse_source, too_large


def format_source(source: Source) -> str:
    """Return the text of a file in the canonical style.

    Raises LoraFxError with everything that cannot be read, if something cannot. What the file
    means, and whether it means anything, plays no part.
    """
    if diagnostic := too_large(source):
        raise LoraFxError([diagnostic])
    reading = grammar().parse_interactive(source.text)
    try:
        tokens = reading.exhaust_lexer()
        tree = reading.feed_eof(tokens[-1] if tokens else None)
    except UnexpectedInput as error:
        raise LoraFxError(parse_source(source)[1]) from error
    pieces = read_pieces(source.text, tokens)
    return text_of(file_lines(*read_statements(pieces, starts(tree))))
