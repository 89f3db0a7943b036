"""Golden texts: `EXPECTTEST_ACCEPT=1` writes them anew."""

import os
from pathlib import Path


def assert_golden(path: Path, text: str) -> None:
    """The file holds exactly this text."""
    text = text.rstrip("\n") + "\n"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
