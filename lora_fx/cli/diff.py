"""`lora-fx diff`: what happens to a layer's graph between two stages."""

from difflib import unified_diff
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lora_fx.cli.graphs import program
from lora_fx.graph.verify import Stage

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def run(
    spec: Path, model: str | None, before: Stage, after: Stage, layer: int, evaluation: bool
) -> None:
    """Print a unified diff to stdout, coloured on a terminal."""
    captured = program(spec, model, layer, evaluation)
    lines = unified_diff(
        captured.text(before).splitlines(),
        captured.text(after).splitlines(),
        before,
        after,
        lineterm="",
    )
    console = Console(soft_wrap=True, highlight=False)
    for line in lines:
        console.print(Text(line, _STYLES.get(line[:1], "")))
