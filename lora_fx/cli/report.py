"""Diagnostics on stderr."""

from collections.abc import Sequence

from lora_fx.diagnostics import Diagnostic


def report(diagnostics: Sequence[Diagnostic]) -> None:
    """Print diagnostics, a blank line after each, and where to read more about an error.

    Coloured on a terminal without NO_COLOR.
    """
    if not diagnostics:
        return
    from rich.console import Console

    from lora_fx.diagnostics import to_rich

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    width = console.width if console.is_terminal else None
    for diagnostic in diagnostics:
        console.print(to_rich(diagnostic, width))
        console.print()
    if errors := [d.code for d in diagnostics if d.severity == "error"]:
        console.print(f"More, with examples: lora-fx explain {errors[0]}")
