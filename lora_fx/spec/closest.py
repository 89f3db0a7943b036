"""The closest of the words that would have been right."""

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

_MOST_WORDS = 200
_MOST_CHARACTERS = 80


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word most like a misspelt one, in whatever case, or None if none is alike.

    Time is bounded: words that nobody writes, and more words than a file has, are not looked at.
    """
    if len(word) > _MOST_CHARACTERS:
        return None
    words = {w.lower(): w for w in _some(known) if len(w) <= _MOST_CHARACTERS}
    found = get_close_matches(word.lower(), words, n=1, cutoff=0.6)
    return words[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return the help for an unknown word: the closest one, or the list if it is short."""
    words = _some(known)
    found = closest(word, words)
    if found is not None:
        return f"did you mean `{found}`?"
    if 0 < len(words) <= 16:
        return "known are " + ", ".join(f"`{w}`" for w in words)
    return None


def _some(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(islice(words, _MOST_WORDS)))
