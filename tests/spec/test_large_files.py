"""Files as large as may be: time grows with the size, not with its square."""

import time
from contextlib import suppress

import pytest

from lora_fx.diagnostics import LoraFxError
from lora_fx.spec import parse

MOST_CHARACTERS = 240_000


def filled(what: str) -> str:
    """As many of a statement, `#` numbered, as fit into a file."""
    parts, length = [], 0
    while length < MOST_CHARACTERS:
        parts.append(what.replace("#", str(len(parts))))
        length += len(parts[-1])
    return "".join(parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        filled("let a# = b#\n"),
        filled("let a# = 1\nlet b# = a#\n"),
        filled("preset p# { rank = 1 }\n") + "adapter x { target linear }",
        f"adapter x {{ target linear {filled('use p# ')} }}",
        filled("preset p# { rank = 1 } adapter x# { use q# target linear }\n"),
        filled("adapter x# { rank = a# target linear }\n"),
        filled("adapter x# { a# = 1 target linear }\n"),
        filled("adapter x# { target linear }\n"),
        "adapter x { target linear }\n" * 8_000,
        f"adapter x {{ {filled('target q# except k# in layers[#] where layer.index < # ')} }}",
        "adapter x { target linear } route { " + filled('when "#" -> x# ') + "}",
        filled("adapter x# { target linear } merge m# { from x# + m# }\n"),
        filled('include "#.lora"\n'),
        filled("quantize linear { method = nf4 a# = 1 }\n"),
        filled("check a#.b < 3\n"),
        f"layers {{ replicate {filled('0..#, ')} 0..1 }}",
    ],
    ids=lambda text: text[:30],
)
def test_time_is_bounded(text: str) -> None:
    start = time.process_time()
    with suppress(LoraFxError):
        parse(f"lora 1\n{text[:MOST_CHARACTERS]}\n")
    assert time.process_time() - start < 30
