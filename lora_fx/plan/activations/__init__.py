"""Estimate what a training step keeps for its backward pass, by running one without weights.

The model is built again on the meta device with the plan's branches in it, and autograd is asked
what it keeps: where no gradient flows, nothing. Layers that are compiled keep less, since they
compute elementwise results again: `least_cut.py` says what.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.activations.branches import add_branch, train, train_parameter
from lora_fx.plan.activations.example import Example, NoExample, example_of
from lora_fx.plan.activations.kept import Kept
from lora_fx.plan.activations.without_values import WithoutValues
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.stacks import find_stacks
from lora_fx.spec.spec import CompileSpec

if TYPE_CHECKING:
    from lora_fx.plan.plan import Plan


@dataclass(frozen=True)
class Activations:
    """Bytes that are kept for the backward pass, and of which inputs, in words."""

    bytes: int
    of: str


def estimate_activations(
    plan: "Plan", batch: int, sequence: int | None, compiled: bool = True
) -> Activations:
    """Return the activations of a training step on `batch` samples of `sequence` tokens.

    With `compiled`, of layers and a loss that are; what lies outside them counts as if it were not,
    with `unit = model` too.

    Of the adapters that are active in training: the first that is trained, or with
    `route { train = true }` all. In the dtype of the base weights, without autocast; attention
    counts as a fused kernel does. Raises LoraFxError if the model cannot be built or run so.
    """
    try:
        tree = _trained_tree(plan)
        example = example_of(tree, batch, sequence)
        kept = _run(tree, example, compiled)
    except NoExample as error:
        raise _no_estimate(str(error), error.help) from error
    except Exception as error:  # whatever a forward does that is not made for meta tensors
        reason = (str(error).splitlines() or [""])[0]
        raise _no_estimate(f"{type(error).__name__}: {reason}") from error
    return Activations(_bytes(kept, plan.spec.compile), example.text)


def _trained_tree(plan: "Plan") -> Any:
    if plan.blueprint is None:
        raise NoExample("it is no model of transformers, so its inputs are not known")
    tree = plan.blueprint.build().requires_grad_(False).train()
    for adapter in _active(plan):
        for copy in (*adapter.modules, *adapter.tokens):
            if copy.trainable:
                train(tree.get_submodule(copy.fqn))
        for bias in adapter.biases:
            if bias.trainable:
                fqn, _, name = bias.name.rpartition(".")
                train_parameter(tree.get_submodule(fqn), name)
        for site in adapter.sites:
            add_branch(tree, site, site.trained_tensors)
    return tree


def _active(plan: "Plan") -> Sequence[AdapterPlan]:
    trained = [adapter for adapter in plan.adapters if any(p.trainable for p in adapter.everything)]
    route = plan.spec.route
    return trained if route is not None and route.train else trained[:1]


def _run(tree: nn.Module, example: Example, compiled: bool) -> Kept:
    layers = [layer for stack in find_stacks(tree) for layer in stack.layers]
    kept = Kept(tree, layers, compiled)
    with torch.enable_grad(), WithoutValues(), kept.recording():
        outputs = tree(**example.inputs)
        with kept.of_one_region():
            _loss(outputs)
    return kept


def _loss(outputs: Any) -> Tensor | None:
    """Cross entropy in float32, as transformers computes it; of a headless model nothing."""
    logits = outputs.get("logits")
    if logits is None:
        return None
    rows = logits.float().flatten(0, -2)
    return F.cross_entropy(rows, torch.ones(len(rows), dtype=torch.long, device="meta"))


def _bytes(kept: Kept, compile: CompileSpec) -> int:
    """Return bytes with the layers recomputed that the spec says.

    A budget is a share of what each layer keeps beside its inputs; the rest of one layer is there
    again while its backward pass runs. So it lies in between, by that share.
    """
    if compile.checkpoint == "none":
        return kept.bytes()
    least = kept.bytes_with_recomputed_layers()
    share = compile.budget or 0.0
    return least + round(share * (kept.bytes() - least))


def _no_estimate(reason: str, help: str | None = None) -> LoraFxError:
    message = "activations are not estimated for this model"
    return LoraFxError((Diagnostic("no-estimate", message, notes=(reason,), help=help),))
