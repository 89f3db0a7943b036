"""The `lora-fx` command. A command is loaded when it runs, with what it needs: `check` no torch.

The command `plan` is the function `plan` of `lora_fx/cli/plan.py`; where that name is a keyword of
Python, an underscore follows it.
"""

import sys
from importlib import import_module
from keyword import iskeyword

import typer

from lora_fx.cli.report import report
from lora_fx.diagnostics import LoraFxError

COMMANDS = (
    *(
        "init",
        "check",
        "explain",
        "fmt",
        "plan",
        "compile",
        "merge",
        "convert",
        "show",
        "diff",
        "import",
        "schema",
    ),
)


def main() -> None:
    """Run the command line; what is wrong with a spec goes to stderr, and the exit status is 1."""
    try:
        _app(*sys.argv[1:2])(prog_name="lora-fx")
    except LoraFxError as error:
        report(error.diagnostics)
        sys.exit(1)


def _app(first: str = "") -> typer.Typer:
    """Return the command line with the command that is called, or with all if there is no such."""
    app = typer.Typer(
        help="A declarative graph-rewrite compiler for LoRA.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(lambda: None)  # so that one command is a command too
    for command in [first] if first in COMMANDS else COMMANDS:
        name = f"{command}_" if iskeyword(command) else command
        app.command(command)(getattr(import_module(f"lora_fx.cli.{name}"), name))
    return app
