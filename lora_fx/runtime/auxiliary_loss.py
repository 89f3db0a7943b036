"""What variants add to a loss in training.

KaSA's regularisation, summed over its modules; MonteCLoRA's divergences, their mean.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from lora_fx.adapters import storage
from lora_fx.adapters.sites.kasa import regularization
from lora_fx.adapters.sites.sampler import Sampler
from lora_fx.graph.monteclora import divergence, mixture, variances
from lora_fx.plan.rules import AdapterPlan

_VARIANTS = ("kasa", "monteclora")
_IGNORED = -100  # a label


def auxiliary_loss(model: nn.Module, adapters: Iterable[AdapterPlan]) -> Tensor | None:
    """Return what these adapters add to the loss of a whole batch; None if it is nothing."""
    each = [s for plan in adapters for s in plan.sites if s.variant.name in _VARIANTS]
    placed = dict(storage.sites(model)) if each else {}
    found: list[Tensor] = []
    drawn: list[Tensor] = []
    for site in each:
        if site.variant.name == "kasa":
            own = storage.tensors(placed[site.fqn], site.adapter)
            weights = (site.variant.argument("beta"), site.variant.argument("gamma"))
            beta, gamma = (float(weight) for weight in weights)  # type: ignore[arg-type]
            A, B, d = (own[name] for name in ("lora_A.weight", "lora_B.weight", storage.DIAGONAL))
            found.append(regularization(A, B, d, beta, gamma))
        else:
            sampler = placed[site.fqn].lora_branches[site.adapter].sampler
            assert sampler is not None
            drawn.append(_of_draws(sampler, dict(site.variant.arguments)))
    found += [torch.stack(drawn).mean()] if drawn else []
    return sum(found[1:], found[0]) if found else None


def _of_draws(sampler: Sampler, arguments: Mapping[str, Any]) -> Tensor:
    """Return the weighted divergence from the priors, with `use_entropy` and Σ wₙ²."""
    std, prior = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in sampler.parameters())
    v = variances(std, len(std))
    apart = divergence(std, prior, v, arguments["dirichlet_prior"])
    total = arguments["kl_loss_weight"] * apart
    w = mixture(prior, len(prior)) if arguments["use_entropy"] else None
    return total if w is None else total + w.square().sum()


def with_auxiliary_loss(
    model: PreTrainedModel, result: Any, extra: Tensor, inputs: Mapping[str, Any]
) -> Any:
    """Return a model's result with the extra loss in its `loss`, if it has one.

    Where a batch is passed in parts, whose losses are divided by its `num_items_in_batch`, each
    part has the share that its labels are of them, counted as `Trainer` counts these.
    """
    is_tuple = isinstance(result, tuple)
    if inputs.get("labels") is None if is_tuple else result.get("loss") is None:
        return result
    items, labels = inputs.get("num_items_in_batch"), _targets(model, inputs)
    if items is not None and labels is not None:
        extra = extra * (labels != _IGNORED).sum() / items
    if is_tuple:
        return (result[0] + extra.to(result[0]), *result[1:])
    result["loss"] = result["loss"] + extra.to(result["loss"])
    return result


def _targets(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the labels that a loss is of: a causal language model's has none for the first."""
    shifted, labels = inputs.get("shift_labels"), inputs.get("labels")
    if shifted is not None or labels is None:
        return shifted
    is_causal = LOSS_MAPPING.get(model.loss_type or "") is ForCausalLMLoss
    return labels[..., 1:] if is_causal and not model.config.is_encoder_decoder else labels
