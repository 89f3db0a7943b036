"""Adapters that come with weights: `weights = "folder"` in a spec."""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lora_fx.adapters.bind import bind
from lora_fx.adapters.peft.keys import (
    expected_shapes,
    overwrite,
    with_doubled_out_proj,
    without_values,
)
from lora_fx.adapters.peft.read import read
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.doubled_out_proj import is_doubled
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.weights import weights_folder
from lora_fx.spec.spec import AdapterSpec, Setting

_SAYS_SCALING = frozenset(("alpha", "scaling"))


def read_weights(
    adapter: AdapterPlan, spec: AdapterSpec, model: nn.Module, layers: Sequence[int] | None
) -> Mapping[str, Tensor]:
    """Return the tensors in the folder that `weights` names, by their names in a file.

    With `doubled_out_proj` as what they compute where PEFT trained them. The model is only looked
    at.

    Raises LoraFxError as `read` does, and if the folder holds other modules or ranks than the spec
    plans, or scales them otherwise than a spec that does not say how.
    """
    setting = spec.settings["weights"]
    try:
        loaded = read(weights_folder(setting), adapter.name, model, layers)
    except LoraFxError as error:
        there = ((setting.span, "named here"),)
        found = (dataclasses.replace(d, secondary=d.secondary + there) for d in error.diagnostics)
        raise LoraFxError(found) from error
    planned, present = (expected_shapes(plan, model) for plan in (adapter, loaded.plan))
    differing = [name for name in planned | present if planned.get(name) != present.get(name)]
    if differing:
        name = differing[0]
        label = f"`{name}` is {planned.get(name, 'nothing')} here, {present.get(name, 'nothing')}"
        message = "the folder holds other modules or ranks than the spec plans"
        help = "leave out the targets, and the folder's own config says what is adapted"
        raise _differs(setting, message, f"{label} there", len(differing) - 1, help)
    scaled = {site.name: site.scaling for site in loaded.plan.sites}
    silent = (site for site in adapter.sites if not _SAYS_SCALING & site.settings.keys())
    other = [site for site in silent if scaled[site.name] != site.scaling]
    if other:
        site = other[0]
        label = f"{site.scaling:g} here, {scaled[site.name]:g} there, at `{site.name}`"
        message = "the folder scales its adapter otherwise, and the spec does not say how"
        raise _differs(setting, message, label, len(other) - 1, "set `alpha`, or `scaling`")
    if is_doubled(spec):
        return with_doubled_out_proj(loaded.plan, loaded.tensors)
    return loaded.tensors


def bind_weights(model: nn.Module, adapter: AdapterPlan, tensors: Mapping[str, Tensor]) -> None:
    """Put an adapter in place with the values that were read for it, by their names in a file."""
    bind(model, adapter, without_values)
    overwrite(model, adapter.name, tensors)


def _differs(setting: Setting, message: str, label: str, others: int, help: str) -> LoraFxError:
    notes = (f"likewise for {others} more",) if others else ()
    return LoraFxError(
        (Diagnostic("weights-differ", message, setting.span, label, notes=notes, help=help),)
    )
