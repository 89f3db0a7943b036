"""Ask of a model without weights whether its samples are dimension 0 of what its modules get.

It is run on meta tensors, with numbers of samples and tokens that no other size will be: a module
that gets as many rows as there are samples gets the samples.
"""

from collections.abc import Iterable

import torch
from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.activations.example import example_of
from lora_fx.plan.activations.without_values import WithoutValues
from lora_fx.plan.alike import once_each
from lora_fx.plan.folding import numberless
from lora_fx.plan.plan import Plan

SAMPLES, TOKENS = 7, 11


def require_sample_rows(plan: Plan, fqns: Iterable[str]) -> None:
    """Raise LoraFxError for those of these modules that get other rows than samples.

    Says nothing of a model that is none of transformers, or that does not run on meta tensors.
    """
    faults = [
        Diagnostic(
            "rows-not-samples",
            f"`{numberless(fqn)}` gets rows that are not the samples of a batch",
            notes=(f"of {SAMPLES} samples of {TOKENS} tokens it gets {rows} rows",),
            help=f'leave it out of adapters: `except "**.{fqn.rpartition(".")[2]}"`',
        )
        for fqn, rows in rows_of(plan, fqns).items()
        if rows != SAMPLES
    ]
    if faults:
        raise LoraFxError(once_each(faults))


def rows_of(plan: Plan, fqns: Iterable[str]) -> dict[str, int]:
    """Return how many rows each of these modules gets of seven samples, as far as can be known."""
    return {fqn: shape[0] for fqn, shape in shapes_of(plan, fqns)[0].items()}


def shapes_of(plan: Plan, fqns: Iterable[str]) -> tuple[dict[str, torch.Size], bool]:
    """Return the shape of what each of these modules gets of `SAMPLES` samples of `TOKENS` tokens.

    As far as that can be known, and whether it is all: the others then get nothing of tokens.
    """
    found: dict[str, torch.Size] = {}
    if plan.blueprint is None:
        return found, False
    try:
        tree = plan.blueprint.build().eval()
        for fqn in fqns:
            _note(found, fqn, tree.get_submodule(fqn))
        with torch.no_grad(), WithoutValues():
            tree(**example_of(tree, SAMPLES, TOKENS).inputs)
    except Exception:  # whatever a forward does that is not made for meta tensors
        return found, False
    return found, True


def _note(found: dict[str, torch.Size], fqn: str, module: nn.Module) -> None:
    def called(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args:
            found[fqn] = args[0].shape

    module.register_forward_pre_hook(called)
