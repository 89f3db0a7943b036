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

from lora_fx.runtime.unit import Unit, install_unit

NAME = "lora_fx_loss"
_DEFAULT = "ForCausalLM"  # of models that say nothing


class TokenLosses(nn.Module):
    """The sum of the losses of all tokens; how many they are divided by is no part of the graph."""

    def forward(self, **inputs: Any) -> Tensor:
        """Return transformers' loss, not divided."""
        return ForCausalLMLoss(**inputs, num_items_in_batch=1)  # type: ignore[arg-type]


def compile_loss(tree: nn.Module, unit: Unit) -> None:
    """Let a causal language model's loss run in the unit, in place; other models are left alone."""
    if not isinstance(tree, PreTrainedModel) or tree.get_output_embeddings() is None:
        return
    if LOSS_MAPPING.get(getattr(tree, "loss_type", None) or _DEFAULT) is ForCausalLMLoss:
        losses = TokenLosses().train(tree.training)
        tree.add_module(NAME, losses)
        install_unit(losses, unit, None)


def compiled_loss(model: nn.Module, given: Any) -> Any:
    """Return what computes as the loss `given` of a model, compiled if it has been."""
    losses = model._modules.get(NAME)
    return partial(_loss, losses) if losses is not None and given is ForCausalLMLoss else given


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
    targets = {"labels": labels} if shift_labels is None else {"shift_labels": shift_labels}
    total = losses(
        logits=logits,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        **{"labels": None, "shift_labels": None} | targets,
    )
    if num_items_in_batch is None:
        known = labels[..., 1:] if shift_labels is None else shift_labels
        num_items_in_batch = (known != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
