"""`lora-fx plan`."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lora_fx.cli.report import report
from lora_fx.cli.show import ModelOption
from lora_fx.diagnostics import Diagnostic, LoraFxError

if TYPE_CHECKING:
    from lora_fx.plan.plan import Plan

_OF_LOCKS = ("lock-differs", "bad-lock")


def plan(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The .lora file.")],
    model: ModelOption = None,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Samples of a training step, of which the activations are estimated; without it, "
            "those of the spec's `entry train`.",
        ),
    ] = None,
    sequence: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of each sample, likewise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    lock: Annotated[
        bool, typer.Option("--lock", help="Write what each rule matches to SPEC.lock.")
    ] = False,
    locked: Annotated[
        bool, typer.Option("--locked", help="Fail if anything matches otherwise than SPEC.lock.")
    ] = False,
    detailed_exitcode: Annotated[
        bool,
        typer.Option(
            "--detailed-exitcode",
            help="Exit with 2 if anything differs from SPEC.lock, or if there is none.",
        ),
    ] = False,
) -> None:
    """Show which module gets what, and what it takes. Loads no weights."""
    from lora_fx.plan.lock_file import lock_path, write_lock
    from lora_fx.spec import parse

    if lock and locked:
        raise typer.BadParameter("--lock writes what --locked only compares")
    parsed = parse(spec)
    with Console(stderr=True).status("Reading the model"):
        from lora_fx.plan import plan as plan_model

        planned = plan_model(parsed, model)
        memory, remark, unknown = _memory(planned, batch, sequence)
    path = lock_path(parsed)
    differences = [note for note in planned.notes if note.code in _OF_LOCKS]
    if path is None or not path.exists():
        differences.append(_no_lock(spec))
    if locked and differences:
        raise LoraFxError(replace(one, severity="error") for one in differences)
    report([n for n in planned.notes if not (lock and n in differences)] + unknown)
    if as_json:
        print(json.dumps(planned.to_json() | {"memory": memory}, indent=2))
    else:
        from lora_fx.cli.plan_table import print_plan

        print_plan(planned, memory, remark)
    if lock:
        print(f"wrote {write_lock(planned)}", file=sys.stderr)
    if detailed_exitcode and differences:
        raise typer.Exit(2)


def _memory(
    planned: "Plan", batch: int | None, sequence: int | None
) -> tuple[dict[str, int], str, list[Diagnostic]]:
    """Return the memory, a remark on activations, and why they are not in it, as notes."""
    entries = (entry for entry in planned.spec.compile.entries if entry.name == "train")
    entry = next(entries, None)
    if entry is not None:
        batch, sequence = batch or entry.batch, sequence or entry.sequence
    memory = planned.memory()
    if batch is None:
        if sequence is not None:
            raise typer.BadParameter("--sequence needs --batch, or an `entry train` in the spec")
        return memory, "estimated for --batch N --sequence N", []
    try:
        kept = planned.activations(batch, sequence)
    except LoraFxError as error:
        notes = [replace(d, severity="note") for d in error.diagnostics]
        return memory, "cannot be estimated", notes
    total = memory.pop("total") + kept.bytes
    return memory | {"activations": kept.bytes, "total": total}, f"{kept.of}, estimated", []


def _no_lock(spec: Path) -> Diagnostic:
    message = f"there is no lock beside `{spec}`"
    return Diagnostic("no-lock", message, help=f"write it: `lora-fx plan {spec} --lock`")
