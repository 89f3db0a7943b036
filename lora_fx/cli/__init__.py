"""The `lora-fx` command. Each command loads what it needs when it runs: `check` loads no torch."""

import sys

import typer

from lora_fx.cli.check import check
from lora_fx.cli.diff import diff
from lora_fx.cli.plan import plan
from lora_fx.cli.report import report
from lora_fx.cli.show import show
from lora_fx.diagnostics import LoraFxError

app = typer.Typer(
    help="A declarative graph-rewrite compiler for LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("check")(check)
app.command("plan")(plan)
app.command("show")(show)
app.command("diff")(diff)


def main() -> None:
    """Run the command line; what is wrong with a spec goes to stderr, and the exit status is 1."""
    try:
        app(prog_name="lora-fx")
    except LoraFxError as error:
        report(error.diagnostics)
        sys.exit(1)
