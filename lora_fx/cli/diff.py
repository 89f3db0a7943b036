"""`lora-fx diff`."""

from difflib import unified_diff
from typing import Annotated

import typer
from rich.console import Console

from lora_fx.cli.show import EvaluationOption, LayerOption, ModelOption, SpecArgument, Stage

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def diff(
    spec: SpecArgument,
    model: ModelOption = None,
    before: Annotated[Stage, typer.Option("--from", help="The stage to start from.")] = "captured",
    after: Annotated[Stage, typer.Option("--to", help="The stage to compare with.")] = "lowered",
    layer: LayerOption = 0,
    evaluation: EvaluationOption = False,
) -> None:
    """Print what happens to a layer's graph between two stages, as a unified diff."""
    with Console(stderr=True).status("Capturing the graph"):
        from lora_fx.cli.graphs import program

        captured = program(spec, model, layer, evaluation)
        texts = [captured.text(stage).splitlines() for stage in (before, after)]
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in unified_diff(texts[0], texts[1], before, after, lineterm=""):
        console.print(line, style=_STYLES.get(line[:1], ""))
