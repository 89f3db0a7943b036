"""The loss of a causal language model, compiled beside its layers.

Run as it is, transformers' `ForCausalLMLoss` stores the logits in float32, their softmax and its
gradient. In one graph upcast, shift and cross entropy become a read of the logits for the loss and
another for their gradient, and nothing of their size is stored but that gradient, in their dtype.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from lora_fx.runtime.units.unit import Unit, install_unit

_DEFAULT = "ForCausalLM"  # of models that say nothing


class TokenLosses(nn.Module):
    """The sum of the losses of all tokens; how many they are divided by is no part of the graph."""

    def forward(self, **inputs: Any) -> Tensor:
        """Return transformers' loss, not divided."""
        return ForCausalLMLoss(**inputs, num_items_in_batch=1)  # type: ignore[arg-type]


def compile_loss(tree: nn.Module, unit: Unit) -> None:
    """Let a causal language model's loss run in the unit, in place.

    Left alone are other models, and those that were given a loss of their own.
    """
    if isinstance(tree, PreTrainedModel) and _has_standard_loss(tree):
        tree.lora_fx_loss = TokenLosses().train(tree.training)
        install_unit(tree.lora_fx_loss, unit, None)
        tree.loss_function = partial(_loss, tree.lora_fx_loss)


def restore_loss(tree: nn.Module) -> None:
    """Undo `compile_loss`, in place."""
    if getattr(vars(tree).get("_loss_function"), "func", None) is _loss:
        del tree._loss_function
        if isinstance(tree, PreTrainedModel) and not _has_standard_loss(tree):
            tree.loss_function = ForCausalLMLoss


def _has_standard_loss(model: PreTrainedModel) -> bool:
    given = getattr(model, "_loss_function", None)
    if given is None and model.get_output_embeddings() is not None:
        given = LOSS_MAPPING.get(getattr(model, "loss_type", None) or _DEFAULT)
    return given is ForCausalLMLoss or getattr(given, "func", None) is _loss


def _loss(
    losses: nn.Module,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return transformers' `ForCausalLMLoss`: a mean, or the sum over `num_items_in_batch`."""
    total = losses(
        logits=logits,
        labels=labels if shift_labels is None else None,
        shift_labels=shift_labels,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
    )
    if num_items_in_batch is None:
        known = labels[..., 1:] if shift_labels is None else shift_labels
        num_items_in_batch = (known != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
