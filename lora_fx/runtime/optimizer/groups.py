"""Which of a model's trained parameters share a learning rate and a weight decay."""

from typing import Any

from torch import nn

from lora_fx.adapters import storage
from lora_fx.adapters.sites.factors import Vector
from lora_fx.spec.spec import OptimizerSpec


def parameter_groups(model: nn.Module, optimizer: OptimizerSpec) -> list[dict[str, Any]]:
    """Return the groups, as torch's optimizers take them, in the order of the model's parameters.

    Each has `name`, `lr`, `weight_decay`, and the bits that an 8-bit optimizer may keep of its
    moments.
    """
    rates = {
        "embedding": optimizer.lr if optimizer.embedding_lr is None else optimizer.embedding_lr,
        "B": optimizer.lr * (optimizer.loraplus_ratio or 1.0),
        "A and others": optimizer.lr,
    }
    roles, wide = _roles(model), _parameters(model, nn.Embedding)
    vectors = _parameters(model, Vector)  # (1, out, 1…) of a convolution, and yet vectors
    groups: dict[tuple[str, bool, int], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            role = roles.get(id(parameter), "A and others")
            bits = 32 if id(parameter) in wide else 8
            decays = parameter.ndim > 1 and id(parameter) not in vectors
            groups.setdefault((role, decays, bits), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": role if decays else f"{role}, vectors",
            "lr": rates[role],
            "weight_decay": optimizer.weight_decay if decays else 0.0,
            "optim_bits": bits,
        }
        for (role, decays, bits), parameters in groups.items()
    ]


def _roles(model: nn.Module) -> dict[int, str]:
    """Return `embedding` or `B` of the parameters of sites that are one of both."""
    roles: dict[int, str] = {}
    for _, site in storage.sites(model):
        for branch in (b for b in site.lora_branches.values() if not b.tied):
            embedding = site.lora_kind == "embedding"
            if embedding:
                roles[id(branch.A.weight)] = "embedding"
            for parameter in branch.B.parameters():
                roles[id(parameter)] = "embedding" if embedding else "B"
    return roles


def _parameters(model: nn.Module, kind: type[nn.Module]) -> set[int]:
    """Return the parameters of modules of a kind: of embeddings, adapters' are among them."""
    modules = (module for module in model.modules() if isinstance(module, kind))
    return {id(parameter) for module in modules for parameter in module.parameters()}
