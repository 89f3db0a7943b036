"""Patterns over dotted names."""

import re
from collections.abc import Callable
from time import perf_counter

from lora_fx.spec.selectors import Atom

_MOST_WILDCARDS = 12
_MOST_NESTED = 8
_MOST_SECONDS = 1.0
_QUICK = 0.001
_MOST_REPEATED = 100_000
_COUNTED = re.compile(r"\{(\d*)(?:,(\d*))?\}")


class BadPattern(ValueError):
    """A pattern that cannot be read; the text says why."""


_TOKEN = re.compile(
    r"""(?P<deep>(?<![^.{,])\*\*\.)        # any number of segments, none included
    | (?P<tail>(?<![^.{,])\*\*(?![^},]))   # one segment or more, at the end
    | (?P<bad>\*\*)
    | (?P<segment>(?<![^.{,])\*(?![^.},]))  # one whole segment
    | (?P<part>\*)                         # a part of one segment
    | (?P<open>\{) | (?P<close>\}) | (?P<comma>,) | (?P<text>[^*{},]+)""",
    re.VERBOSE,
)
_REGEX = {
    "deep": r"(?:[^.]+\.)*",
    "tail": ".+",
    "segment": "[^.]+",
    "part": "[^.]*",
    "open": "(?:",
    "close": ")",
    "comma": "|",
}


def glob_to_regex(pattern: str) -> re.Pattern[str]:
    """Translate a glob over dotted names into a regex for `fullmatch`.

    `*` matches within one segment, `**` any number of segments (at least one at the end),
    `{a,b}` either. Raises BadPattern.
    """
    if not pattern:
        raise BadPattern("an empty pattern matches nothing")
    if pattern.count("*") > _MOST_WILDCARDS:
        raise BadPattern(f"a pattern may hold {_MOST_WILDCARDS} asterisks at most")
    regex, depth = [], 0
    for token in _TOKEN.finditer(pattern):
        kind = str(token.lastgroup)
        depth += {"open": 1, "close": -1}.get(kind, 0)
        if depth < 0:
            raise BadPattern("`}` has no `{` before it")
        if depth > _MOST_NESTED:
            raise BadPattern(f"braces may stand {_MOST_NESTED} deep inside each other at most")
        if kind == "bad":
            raise BadPattern("`**` stands for whole segments, between dots")
        literal = kind == "text" or (kind == "comma" and not depth)
        regex.append(re.escape(token[0]) if literal else _REGEX[kind])
    if depth:
        raise BadPattern("`{` is never closed")
    return re.compile("".join(regex))


def matcher(atom: Atom) -> Callable[[str], bool]:
    """Return whether a dotted name (for `class`, a class's name) fits an atom's pattern.

    Raises BadPattern; the returned function does so for a pattern that has taken a second in all.
    """
    match atom.kind:
        case "name":
            end = f".{atom.pattern}"
            return lambda name: name == atom.pattern or name.endswith(end)
        case "glob" | "parameter":
            return _bounded(glob_to_regex(atom.pattern).pattern)
        case "regex":
            return _bounded(atom.pattern)
        case _:
            if not atom.pattern:
                raise BadPattern("an empty pattern matches nothing")
            return lambda name: name == atom.pattern


def bad_pattern(atom: Atom) -> str | None:
    """Return why an atom's pattern cannot be read, or None."""
    try:
        matcher(atom)
    except BadPattern as error:
        return str(error)
    return None


def _bounded(pattern: str) -> Callable[[str], bool]:
    """Match a regex in bounded time, which Python's own `re` cannot promise."""
    import regex

    if _repeated(pattern) > _MOST_REPEATED:
        raise BadPattern("the counts in braces are too large")
    try:
        compiled = regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise BadPattern(str(error)) from error

    left = _MOST_SECONDS

    def fits(name: str) -> bool:
        nonlocal left
        start = perf_counter()
        try:
            return compiled.fullmatch(name, timeout=max(left, _QUICK)) is not None
        except TimeoutError as error:
            message = f"takes more than {_MOST_SECONDS:g} s; it did not get past `{name}`"
            raise BadPattern(message) from error
        finally:
            took = perf_counter() - start
            left -= took if took > _QUICK else 0

    return fits


def _repeated(pattern: str) -> int:
    """Return how long a regex is at most with all its `x{3}` written out, as `regex` does."""
    length = len(pattern)
    for counts in _COUNTED.findall(pattern):
        digits = max(counts, key=len)
        length *= max(int(digits[:9] or "0"), 1)
        if length > _MOST_REPEATED:
            return length
    return 0
