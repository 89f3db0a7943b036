"""Diagnostics on stderr."""

from collections.abc import Iterable

from lora_fx.diagnostics import Diagnostic

_PIPED_WIDTH = 120


def report(diagnostics: Iterable[Diagnostic]) -> None:
    """Print diagnostics, a blank line after each; coloured on a terminal without NO_COLOR."""
    from rich.console import Console

    from lora_fx.diagnostics import to_rich

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    width = console.width if console.is_terminal else _PIPED_WIDTH
    for diagnostic in diagnostics:
        console.print(to_rich(diagnostic, width))
        console.print()
