"""Source text on one line."""

import re

_QUOTED_OR_BLANK = re.compile(r'("(?:\\.|[^"\\\n])*")|(?:#[^\n]*|\s)+')


def one_line(text: str) -> str:
    """Return a part of a file without comments and line breaks; texts in quotes stay."""
    return _QUOTED_OR_BLANK.sub(lambda found: found[1] or " ", text).strip()
