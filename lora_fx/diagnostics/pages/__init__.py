"""The pages of `lora-fx explain`: one file for each diagnostic code, `<code>.md`.

A page begins with `# <code>: <summary>`, says what the code means and why, and ends with an example
that is wrong and one that is right.
"""

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Page:
    """What there is to say about a code; `text` is Markdown, the summary is its heading."""

    code: str
    summary: str
    text: str


def codes() -> list[str]:
    """Return all codes that have a page, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.md"))


def page(code: str) -> Page:
    """Return the page of a code. Raises KeyError if there is none."""
    path = _FOLDER / f"{code}.md"
    if code not in codes():
        raise KeyError(code)
    text = path.read_text(encoding="utf-8")
    heading = text.partition("\n")[0]
    return Page(code, heading.partition(": ")[2], text)
