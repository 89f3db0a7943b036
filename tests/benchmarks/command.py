"""What the commands that time candidates have in common: arguments, and who takes part."""

import argparse
from pathlib import Path

from tests.benchmarks.decoders import SHAPES


def parser(description: str | None, of_times: bool = True) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all take, and of those for interleaved times."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--shape", choices=SHAPES, default="llama-8b")
    made.add_argument("--samples", type=int, default=2)
    made.add_argument("--tokens", type=int, default=4096)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--dropout", type=float, default=0.0)
    if of_times:
        add_times(made)
    return made


def add_times(made: argparse.ArgumentParser) -> None:
    made.add_argument("--rounds", type=int, default=10)
    made.add_argument(
        "--only", nargs="+", default=[], metavar="WORD",
        help="candidates with a word in their names, beside the floor and lora_fx",
    )  # fmt: skip
    made.add_argument(
        "--json", type=Path, metavar="FILE",
        help="keep the numbers here; rounds that it has of this device and code are not repeated",
    )  # fmt: skip


def settings(given: argparse.Namespace, **more: str | int) -> dict[str, str | int | float]:
    """Return what of the arguments the times depend on."""
    return {
        **more,
        "shape": given.shape,
        "tokens": f"{given.samples}×{given.tokens}",
        "rank": given.rank,
        "dropout": given.dropout,
        "dtype": "bf16",
    }


def chosen(names: list[str], words: list[str], always: tuple[str, ...]) -> list[str]:
    """Return the candidates with one of the words in their names, and those that always run."""
    unknown = [word for word in words if not any(word in name for name in names)]
    if unknown:
        known = "\n  ".join(names)
        raise SystemExit(
            f"--only: no candidate has `{unknown[0]}` in its name; they are\n  {known}"
        )
    return [n for n in names if not words or n in always or any(word in n for word in words)]
