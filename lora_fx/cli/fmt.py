"""`lora-fx fmt`."""

import re
import sys
from difflib import unified_diff
from pathlib import Path
from typing import Annotated

import typer

from lora_fx.cli.report import report
from lora_fx.diagnostics import Diagnostic, LoraFxError

_LINE = re.compile(r"[^\n]*\n|[^\n]+")


def fmt(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="The .lora files; `-` is stdin, to stdout."),
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if something would change.")
    ] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Write nothing; print the changes.")] = False,
) -> None:
    """Format .lora files in place, in the canonical style.

    A file that cannot be read stays as it is. Comments are kept, and what a file means.
    """
    faults: list[Diagnostic] = []
    changed = False
    for file in files:
        try:
            changed |= _format(file, check, diff)
        except LoraFxError as error:
            faults += error.diagnostics
    report(faults)
    if faults or (check and changed):
        raise typer.Exit(1)


def _format(file: Path, check: bool, diff: bool) -> bool:
    """Format one file, or only tell; whether something changes."""
    from lora_fx.spec.formatter import format_source
    from lora_fx.spec.load import decode, read

    stdin = str(file) == "-"
    name = "<stdin>" if stdin else str(file)
    old = sys.stdin.buffer.read() if stdin else read(file)
    new = format_source(decode(old, name)).encode()
    if diff:
        _print_diff(name, old.decode(), new.decode())
    elif stdin and not check:
        sys.stdout.buffer.write(new)
    elif new != old and check:
        print(f"would format {name}")
    elif new != old:
        _write(file, new)
        print(f"formatted {name}")
    return new != old


def _print_diff(name: str, old: str, new: str) -> None:
    before, after = _LINE.findall(old), _LINE.findall(new)
    for line in unified_diff(before, after, name, name, "now", "formatted"):
        print(line.removesuffix("\n"))
        if not line.endswith("\n"):
            print("\\ No newline at end of file")


def _write(file: Path, new: bytes) -> None:
    from lora_fx.spec.whole_file import write_whole

    try:
        write_whole(file, new)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"`{file}` cannot be written"
        raise LoraFxError([Diagnostic("unwritable-file", message, notes=(reason,))]) from error
