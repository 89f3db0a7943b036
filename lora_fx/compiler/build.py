"""What is known ahead of training, written."""

from pathlib import Path

import torch
from torch import nn

from lora_fx.adapters.init.batches import Batches
from lora_fx.adapters.weights.clone import clone
from lora_fx.compiler.compile import compiled_tree
from lora_fx.plan.merge_sources import require_base_kept
from lora_fx.plan.plan import Plan
from lora_fx.runtime.artifact.base import load_model, place_of
from lora_fx.runtime.artifact.new import new_artifact
from lora_fx.runtime.artifact.write import write_artifact
from lora_fx.runtime.calibration_text import text_batches
from lora_fx.runtime.progress import Report, silent
from lora_fx.spec import parse
from lora_fx.spec.spec import Spec, SpecLike


def build(
    spec: SpecLike,
    model: nn.Module | str | Path | None = None,
    out: str | Path = "artifact",
    *,
    force: bool = False,
    calibration: Batches | str | Path | None = None,
    report: Report = silent,
) -> Plan:
    """Write everything that is known ahead of training into the folder `out`, for `load`.

    That is the adapters as they start and, for each `entry` of the spec, compiled code and the text
    of every graph. `model` is a live model, a folder or a hub id; None is the model that the spec
    names. What is loaded goes to the GPU, if there is one. With `force` an artifact that is there
    is replaced, at once when the new one is whole. `calibration` is that of `compile`, or a text
    file, for the model's tokenizer to split. `report` hears what is being done, and how many steps
    of how many are. Returns the plan. Raises LoraFxError with every fault, and nothing is
    written.
    """
    spec = spec if isinstance(spec, Spec) else parse(spec)
    require_base_kept(spec)
    with new_artifact(Path(out), force) as folder:
        place = place_of(model, spec)
        if not isinstance(model, nn.Module):
            report("loading the model", 0, 1)
            model = load_model(place, "cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(calibration, str | Path):
            calibration = text_batches(Path(calibration), place, model)
        compiled = compiled_tree(clone(model), spec, "inductor", None, calibration, report)
        write_artifact(compiled, folder, place, report)
    return compiled.lora_fx_plan  # type: ignore[return-value]
