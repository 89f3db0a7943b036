"""The weights that an init put in the place of the base's, in a file beside the adapter's.

LoftQ's cannot be had from the base by what a LoRA file can say. The file holds them, and A₀ and B₀
as the adapter started, so that it comes back without decomposing anything. Among the tensors of an
adapter that is read, such a site's stand as `plain` has them, and its weight under a name of its
own.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_fx.adapters import storage
from lora_fx.adapters.init import initialise
from lora_fx.adapters.peft.plain import doubled
from lora_fx.adapters.weights import copies
from lora_fx.plan.packed import packing_of, unpacked
from lora_fx.plan.rules import AdapterPlan

NAME = "changed_weights.safetensors"
_FACTORS = ("lora_A.weight", "lora_B.weight")


def write_weights(folder: Path, model: nn.Module, adapter: str) -> None:
    """Write the file, if an adapter put any weights in place."""
    found: dict[str, Tensor] = {}
    for fqn, site in storage.sites(model):
        change = site.lora_change
        if change is not None and change.adapter == adapter and change.replaced:
            start = change.factors.A.weight, change.factors.B.weight
            found |= {f"{fqn}.{name}": t for name, t in zip(_FACTORS, start, strict=True)}
            weight = copies.base_tensor(site, "weight")
            assert weight is not None
            packed = packing_of(site) is not None
            found[f"{fqn}.weight"] = unpacked(site) if packed else weight
    if found:
        save_file({name: t.detach().contiguous() for name, t in found.items()}, folder / NAME)


def with_weights(
    plan: AdapterPlan, state: Mapping[str, Tensor], folder: Path, model: nn.Module
) -> Mapping[str, Tensor]:
    """Return an adapter's tensors with the weights that it put in place.

    A folder of PEFT has none: they are computed again.
    """
    kept = load_file(folder / NAME) if (folder / NAME).exists() else {}
    whole = dict(state)
    for site in plan.sites:
        if site.replaces_base:
            names = (*_FACTORS, "weight")
            start = {name: kept[f"{site.fqn}.{name}"] for name in names if kept}
            start = start or initialise(site, model.get_submodule(site.fqn))
            whole |= doubled(state, f"{site.fqn}.", start)
            whole[name_of(site.fqn)] = start["weight"]
    return whole


def name_of(fqn: str) -> str:
    """Return the name of a weight among the tensors of an adapter that is read."""
    return f"{fqn}.changed_weight"
