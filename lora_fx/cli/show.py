"""`lora-fx show`: the graph of a layer at a stage."""

from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax

from lora_fx.cli.graphs import program
from lora_fx.graph.verify import Stage


def run(spec: Path, model: str | None, stage: Stage, layer: int, evaluation: bool) -> None:
    """Print the graph's stable text to stdout, coloured on a terminal."""
    text = program(spec, model, layer, evaluation).text(stage)
    console = Console(soft_wrap=True)
    if console.is_terminal:
        console.print(Syntax(text, "python", theme="ansi_dark", background_color="default"))
    else:
        print(text)
