"""Read and format many programs that are nearly right: nothing but LoraFxError may come of it.

    python tests/spec/fuzz.py --programs 100000 --seed 0

Prints each failure once, with the smallest text found that shows it; the exit status tells.
"""

import argparse
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hypothesis import Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import track

import lora_fx
from lora_fx.diagnostics import LoraFxError, render
from tests.spec import grammatical, programs
from tests.spec.formatting import check, formatted

ROOT = Path(__file__).parent.parent.parent
MOST_SECONDS = 2.0
_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|#[^\n]*|\w+|\s+|.', re.DOTALL)
_JUNK = [
    *"{}[]()=,;\"'@#?*-+/.%<>!:\\\n\t\r\0é模𝔁\u202e\ufeff\u2028",
    *("..", "->", "==", "<=", "1e999", "9" * 40, "0" * 40, "1" * 5000, "1.5e-400", "99999999%"),
    *("lora 1", "layer.index", "model.config.a.b", "in layers[", '"**.a"', "# x\n", "in", "if"),
    *("adapter", "target", "base", "let", "rank", "then", "else", "not", "and", "or", "where"),
    *("route", "merge", "from", "when", "default", "tokens", "train", "include", "except", "of"),
]
_NESTS = [
    "(",
    "[",
    "{",
    "-",
    "not ",
    "if a then ",
    "f(",
    "1 + ",
    "a.",
    "a, ",
    "adapter x {",
    "# \n",
]


@dataclass(frozen=True)
class Failure:
    """What happened, and the text it happened with."""

    what: str
    text: str


def fuzz(number: int, seed: int, show: Callable[[range], Iterable[int]] = iter) -> list[Failure]:
    """Return the failures among so many mutated programs, each kind once, its text made small."""
    random = Random(seed)
    corpus = [*handwritten(), *generated(max(number // 50, 20), seed)]
    found: dict[str, Failure] = {}
    for _ in show(range(number)):
        text = mutated(random, corpus)
        what = failure(text)
        if what is not None and what not in found:
            found[what] = Failure(what, smallest(text, what))
    return list(found.values())


def handwritten() -> list[str]:
    files = [*ROOT.glob("tests/**/*.lora"), *ROOT.glob("examples/*.lora")]
    reference = (ROOT / "grammar" / "README.md").read_text()
    blocks = re.findall(r"^```lora\n(.*?)^```", reference, re.MULTILINE | re.DOTALL)
    return [*(path.read_text() for path in sorted(files)), *blocks]


def generated(number: int, seed: int) -> list[str]:
    texts: list[str] = []

    @seeded(seed)
    @settings(max_examples=number, deadline=None, database=None, phases=[Phase.generate])
    @given(st.one_of(programs.programs(), grammatical.programs()))
    def collect(text: str) -> None:
        texts.append(text)

    collect()
    return texts


def mutated(random: Random, corpus: list[str]) -> str:
    """Return a program of the corpus after a few changes."""
    text = random.choice(corpus)
    for _ in range(random.choice([1, 1, 2, 2, 3, 5])):
        text = random.choice(_MUTATIONS)(random, text, corpus)[:20_000]
    return f"{text}\n"


def _change_token(random: Random, text: str, corpus: list[str]) -> str:
    tokens = _TOKEN.findall(text) or [""]
    at, other = random.randrange(len(tokens)), random.randrange(len(tokens))
    match random.randrange(5):
        case 0:
            del tokens[at : at + random.choice([1, 1, 2, 5])]
        case 1:
            tokens.insert(other, tokens[at])
        case 2:
            tokens[at], tokens[other] = tokens[other], tokens[at]
        case 3:
            tokens.insert(at, random.choice(_JUNK))
        case _:
            tokens[at] = random.choice(_JUNK)
    return "".join(tokens)


def _flip_bits(random: Random, text: str, corpus: list[str]) -> str:
    data = bytearray(text.encode())
    for _ in range(random.randint(1, 4)):
        if data:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return data.decode(errors="replace")


def _cut(random: Random, text: str, corpus: list[str]) -> str:
    at = random.randint(0, len(text))
    return random.choice([text[:at], text[at:]])


def _splice(random: Random, text: str, corpus: list[str]) -> str:
    other = random.choice(corpus)
    return text[: random.randint(0, len(text))] + other[random.randint(0, len(other)) :]


def _nest(random: Random, text: str, corpus: list[str]) -> str:
    at = random.randint(0, len(text))
    opened = random.choice(_NESTS) * random.choice([2, 30, 60, 600])
    return text[:at] + opened + text[at:]


def _repeat(random: Random, text: str, corpus: list[str]) -> str:
    start = random.randint(0, len(text))
    end = random.randint(start, min(start + 60, len(text)))
    return text[:end] + text[start:end] * random.choice([1, 5, 100]) + text[end:]


_MUTATIONS = [_change_token] * 5 + [_flip_bits, _cut, _splice, _nest, _repeat]


def failure(text: str) -> str | None:
    """Return what goes wrong with a text that must not, without its details."""
    try:
        if all(_seconds(text) > MOST_SECONDS for _ in range(3)):  # once may be the collector's
            return f"more than {MOST_SECONDS} s"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {frame.name}, {Path(frame.filename).name}"
    return None


def _seconds(text: str) -> float:
    """Read, format and check a text; return the time that this thread has spent on it."""
    start = time.thread_time()
    told(lambda: lora_fx.parse(text))
    if told(lambda: formatted(text)):
        check(text)
    return time.thread_time() - start


def told(act: Callable[[], object]) -> bool:
    """Whether something works; where it does not, there is something to tell."""
    try:
        act()
    except LoraFxError as caught:
        error = caught
    else:
        return True
    assert render(error.diagnostics, width=60)
    return False


def smallest(text: str, what: str, most_tries: int = 1500) -> str:
    """Return a part of a text with which the same goes wrong."""
    size = len(text) // 2
    while size and most_tries > 0:
        at = 0
        while at < len(text) and most_tries > 0:
            shorter = text[:at] + text[at + size :]
            most_tries -= 1
            if "\n" in shorter and failure(shorter) == what:
                text = shorter
            else:
                at += size
        size //= 2
    return text


def main(programs: int, seed: int) -> int:
    """Print the failures and their number."""
    os.chdir(tempfile.mkdtemp())  # nothing there can be included
    console = Console(stderr=True)
    found = fuzz(programs, seed, lambda numbers: track(numbers, "fuzzing", console=console))
    for one in found:
        print(f"--- {one.what}\n{one.text!r}\n")
    print(f"{len(found)} kinds of failure in {programs} programs, seed {seed}")
    return 1 if found else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(main(**vars(parser.parse_args())))
