"""The optimizer of a spec, over what its adapters train."""

from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.plan import Plan
from lora_fx.runtime.optimizer.groups import parameter_groups
from lora_fx.runtime.optimizer.lora_fa import LoraFA, pairs


def optimizer(model: nn.Module) -> Optimizer:
    """Return the optimizer that the spec of a compiled model describes, for `Trainer` or a loop.

    It has the parameters that are trained now, of all adapters. With `loraplus_ratio` λ the
    learning rate of B, and of its bias, is λ·lr (Hayou et al. 2024, LoRA+, arXiv 2402.12354, §1);
    A and B of embeddings have `embedding_lr`; everything else has lr. Only matrices decay.
    `adamw8bit` and `paged_adamw8bit` are those of bitsandbytes, with 32 bits for embeddings. With
    `lora_fa` no A is trained, and B by `LoraFA`.

    Raises LoraFxError if the spec has no `optimizer`, or if nothing is trained.
    """
    plan: Plan | None = getattr(model, "lora_fx_plan", None)
    asked = None if plan is None else plan.spec.optimizer
    if asked is None:
        message = "the spec of this model has no `optimizer`"
        help = "write `optimizer { lr = 2e-4 }` into it"
        raise LoraFxError((Diagnostic("no-optimizer", message, help=help),))
    groups = parameter_groups(model, asked)
    if not groups:
        message = "nothing of this model is trained"
        help = "load an adapter with `is_trainable=True`"
        raise LoraFxError((Diagnostic("no-optimizer", message, asked.span, help=help),))
    given = {"betas": asked.betas, "eps": asked.eps, "momentum": asked.momentum}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    match asked.name:
        case "sgd":
            return SGD(groups, asked.lr, **settings)
        case "adamw":
            return AdamW(groups, asked.lr, **settings)
        case "lora_fa":
            return LoraFA(groups, pairs(model), lr=asked.lr, **settings)
        case name:
            from lora_fx.runtime.optimizer.eight_bit import AdamW8bit, PagedAdamW8bit

            cls = PagedAdamW8bit if name == "paged_adamw8bit" else AdamW8bit
            return cls(groups, asked.lr, **settings)
