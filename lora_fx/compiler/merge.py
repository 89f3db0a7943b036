"""The merges of a spec, carried out on a checkpoint, without its model."""

from pathlib import Path

from lora_fx.compiler.bind import weights_of
from lora_fx.compiler.compile import plan_tree
from lora_fx.runtime.artifact.base import place_of
from lora_fx.runtime.given_weights import bind_weights
from lora_fx.runtime.merging.statements import combine_statements
from lora_fx.runtime.progress import Report, silent
from lora_fx.runtime.root import make_root
from lora_fx.runtime.streamed.mapped_model import map_model
from lora_fx.runtime.streamed.write_merges import require_saves, require_whole, write_merges
from lora_fx.spec import parse
from lora_fx.spec.spec import Spec, SpecLike


def merge(
    spec: SpecLike,
    model: str | Path | None = None,
    *,
    force: bool = False,
    report: Report = silent,
) -> list[Path]:
    """Carry out the merges of a spec and write those that say `save`; return the folders.

    What goes into the base is streamed from the model's safetensors checkpoint, of which one tensor
    is in memory at a time. A run that was cut off goes on where it was. `model` is a folder or a
    hub id; None is the model that the spec names. Each folder appears when it is whole; what is
    there is replaced only with `force`. Raises LoraFxError with every fault, and nothing is
    written.
    """
    spec = spec if isinstance(spec, Spec) else parse(spec)
    require_saves(spec, force)
    report("reading the adapters", 0, 1)
    mapped = map_model(place_of(model, spec), spec)
    tree = mapped.tree
    plan, _ = plan_tree(tree, spec, None)
    require_whole(plan)
    given = weights_of(tree, plan)
    there = {a.name: a for a in plan.adapters if a.name in given}
    for adapter in there.values():
        bind_weights(tree, adapter, given[adapter.name])
    make_root(tree, plan, combine_statements(tree, spec, there))
    return write_merges(tree, spec, mapped, report)  # type: ignore[arg-type]
