"""What training all of a model changed of it: low-rank factors where that can be, else copies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.adapters.combine.low_rank import LowRank, Rank, low_rank
from lora_fx.adapters.weights.copies import own_names
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.kinds import layer_of

_KINDS = ("linear", "transposed", "conv")


@dataclass(frozen=True)
class Difference:
    """The changes of weights by fqn; modules that are kept whole; what else must be said."""

    changes: Mapping[str, LowRank]
    whole: Sequence[str]
    biased: bool
    tied: bool

    @staticmethod
    def of(tuned: nn.Module, base: nn.Module, rank: Rank) -> "Difference":
        """Compare two models of one architecture. Raises LoraFxError if they are not, or equal."""
        others, changes, whole = _same_modules(tuned, base), {}, []
        biased, tied, holders = False, False, _holders(base)
        for fqn, module in base.named_modules():
            apart = _apart(module, others[fqn])
            sharing = [
                one for name in apart for one in holders.get(id(getattr(module, name)), [fqn])
            ]
            layer, is_shared = layer_of(module), len(set(sharing)) > 1
            if is_shared:
                _require_still_shared(sharing, others)
            is_factored = layer is not None and layer.kind in _KINDS and layer.groups == 1
            if layer is not None and is_factored and "weight" in apart and not is_shared:
                delta = _oriented(others[fqn], layer.kind) - _oriented(module, layer.kind)
                changes[fqn] = low_rank(delta, rank)
                biased |= "bias" in apart
            elif apart and sharing[0] == fqn:
                whole.append(fqn)
                tied |= is_shared
        if not changes:
            message, help = "the two models have the same weights", None
            if whole:
                kept = ", ".join(f"`{fqn}`" for fqn in whole)
                message = f"only {kept} changed, of which an adapter holds a copy, not factors"
                help = "keep the trained model"
            raise LoraFxError((Diagnostic("cannot-convert", message, help=help),))
        return Difference(changes, whole, biased, tied)

    def spec(self) -> str:
        """Return the spec of an adapter that holds the difference; it is named `default`."""
        lines = [f'target "{fqn}" {{ rank = {len(one.A)} }}' for fqn, one in self.changes.items()]
        lines += [f'train "{fqn}"' for fqn in self.whole]
        lines += ["bias = lora_only"] * self.biased + ["tie = true"] * self.tied
        body = "\n".join(f"  {line}" for line in lines)
        return f"lora 1\nadapter default {{\n  alpha = rank\n{body}\n}}\n"


def _same_modules(tuned: nn.Module, base: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by fqn, which have the tensors of the base's modules."""
    others, faults = dict(tuned.named_modules()), []
    for fqn, module in base.named_modules():
        own = others.get(fqn, nn.Module())
        for name in own_names(module):
            there, here = getattr(own, name, None), getattr(module, name)
            if not isinstance(there, Tensor) or there.shape != here.shape:
                message = (
                    f"the trained model has no `{f'{fqn}.{name}'.lstrip('.')}` like the base's"
                )
                faults.append(Diagnostic("cannot-convert", message))
    if faults:
        raise LoraFxError(faults)
    return others


def _require_still_shared(sharing: Sequence[str], others: Mapping[str, nn.Module]) -> None:
    """Raise LoraFxError if modules that share a weight in the base have different ones now."""
    first, *rest = dict.fromkeys(sharing)
    for other in rest:
        if not torch.equal(others[first].weight, others[other].weight):  # type: ignore[arg-type]
            message = f"`{first}` and `{other}` share a weight in the base, and no longer"
            help = "give the base separate weights too: `tie_word_embeddings=False` in its config"
            raise LoraFxError((Diagnostic("cannot-convert", message, help=help),))


def _holders(base: nn.Module) -> dict[int, list[str]]:
    """Return the names of the modules that have a parameter, by its id."""
    found: dict[int, list[str]] = {}
    for fqn, module in base.named_modules():
        for parameter in module._parameters.values():
            found.setdefault(id(parameter), []).append(fqn)
    return found


def _apart(module: nn.Module, other: nn.Module) -> list[str]:
    """Return the names of a module's own tensors that are others in the other one."""
    names = own_names(module)
    return [n for n in names if not torch.equal(getattr(module, n), getattr(other, n))]


def _oriented(module: nn.Module, kind: str) -> Tensor:
    """Return a weight as (out, in), in float32 or its wider dtype."""
    weight = module.get_parameter("weight").detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight.t() if kind == "transposed" else weight.flatten(1)
