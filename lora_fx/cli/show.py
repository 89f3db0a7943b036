"""`lora-fx show`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

Stage = Literal["captured", "adapted", "fused", "lowered"]
Shown = Literal["captured", "adapted", "fused", "lowered", "merge"]

SpecArgument = Annotated[Path, typer.Argument(metavar="SPEC", help="The .lora file.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="A folder, a config.json or a hub id; without it, the model that the spec names.",
    ),
]
LayerOption = Annotated[
    int, typer.Option(metavar="N", help="The layer, counted after replication.")
]
EvaluationOption = Annotated[
    bool, typer.Option("--evaluation", help="The graph of evaluation: no dropout, no gradients.")
]


def show(
    spec: SpecArgument,
    model: ModelOption = None,
    stage: Annotated[
        Shown,
        typer.Option(help="How far the rewriting has gone; `merge` is what merges the adapter."),
    ] = "lowered",
    layer: LayerOption = 0,
    evaluation: EvaluationOption = False,
) -> None:
    """Print the rewritten graph of one layer (of the whole model with `unit = model`).

    Loads no weights. Weights print as @name within the layer, sizes that may change as s0, s1.
    """
    with Console(stderr=True).status("Capturing the graph"):
        from lora_fx.cli.graphs import merge_text, program

        if stage == "merge":
            text = merge_text(spec, model, layer)
        else:
            text = program(spec, model, layer, evaluation).text(stage)
    print_graph(text.splitlines())


def print_graph(lines: list[str]) -> None:
    """Print lines of a graph whole; on a terminal, what the spec put there stands out."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in lines:
        code, mark, comment = line.partition("   # ")
        console.print(code, end="", style="bold" if mark else "")
        console.print(f"{mark}{comment}", style="dim cyan")
