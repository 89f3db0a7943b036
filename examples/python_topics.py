"""Paragraphs of Python's language reference with the topic they are from; no download (`pydoc`)."""

import re
from dataclasses import dataclass
from pydoc_data.topics import topics

TOPICS = {
    "types": "the kinds of objects",
    "compound": "statements with a body",
    "string-methods": "methods of strings",
    "typesmapping": "dictionaries",
    "formatstrings": "formatting",
    "debugger": "the debugger",
}
HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class Paragraph:
    """A text, and the index of its topic in `TOPICS`."""

    text: str
    topic: int


def split() -> tuple[list[Paragraph], list[Paragraph]]:
    """Return paragraphs to train on and held-out ones; what several topics share is in neither."""
    found: dict[str, set[int]] = {}
    for index, name in enumerate(TOPICS):
        for part in re.split(r"\n\s*\n", topics[name]):
            if len(part.split()) >= 12:
                found.setdefault(" ".join(part.split()), set()).add(index)
    own = [Paragraph(text, topic) for text, (topic, *others) in found.items() if not others]
    training = [paragraph for index, paragraph in enumerate(own) if index % HELD_OUT_EVERY]
    return training, own[::HELD_OUT_EVERY]
