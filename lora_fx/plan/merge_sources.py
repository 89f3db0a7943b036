"""What merges take from: adapters that are trained already, and what becomes of them."""

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.spec.spec import Spec


def require_weights(spec: Spec) -> None:
    """Raise LoraFxError if a merge takes from an adapter that is only about to be trained."""
    named = {adapter.name: adapter for adapter in spec.adapters}
    faults = [
        Diagnostic(
            "no-weights",
            f"merge `{merge.name}` takes from `{term.name}`, which has no weights yet",
            term.span,
            secondary=((named[term.name].span, "to be trained"),),
            help=f'write `weights = "folder"` in `{term.name}`, or merge once it is trained',
        )
        for merge in spec.merges
        for term in merge.mix.terms
        if term.name in named and "weights" not in named[term.name].settings
    ]
    if faults:
        raise LoraFxError(faults)


def require_base_kept(spec: Spec) -> None:
    """Raise LoraFxError if a merge goes into the base: an artifact has none."""
    faults = [
        Diagnostic(
            "not-supported-yet",
            "an artifact of a spec that merges into the base cannot be written yet",
            merge.span,
            help="write the merged model with `lora-fx merge`, and name that in `model`",
        )
        for merge in spec.merges
        if merge.into_base
    ]
    if faults:
        raise LoraFxError(faults)


def base_sources(spec: Spec) -> set[str]:
    """Return the names of adapters and merges that go into the base."""
    terms = {merge.name: [term.name for term in merge.mix.terms] for merge in spec.merges}
    found: set[str] = set()
    left = [merge.name for merge in spec.merges if merge.into_base]
    while left:
        name = left.pop()
        found.add(name)
        left += [term for term in terms.get(name, ()) if term not in found]
    return found
