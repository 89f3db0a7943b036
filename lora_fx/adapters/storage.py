"""Where a site keeps an adapter's tensors. No other file knows the layout."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_fx.adapters.dynamic_class import specialise
from lora_fx.adapters.sites.attention_site import is_projection, mark_projection
from lora_fx.adapters.sites.convolution_site import ConvolutionSite
from lora_fx.adapters.sites.factors import Arithmetic, Direction, Factors, Holder, Vector
from lora_fx.adapters.sites.layer import is_convolution
from lora_fx.adapters.sites.parameter_site import SITES, mark_parameter, parameter_sites
from lora_fx.adapters.sites.sampler import NAME as SAMPLER
from lora_fx.adapters.sites.sampler import PRIORS, Sampler
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights.own_outputs import OwnOutputs
from lora_fx.plan.modules import outside_adapters
from lora_fx.plan.offloaded import device_of

MAGNITUDE = "lora_magnitude_vector"
DIRECTION = "lora_velora_embed"
DIAGONAL = "lora_diag"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Held = TypeVar("Held", bound=nn.Module)
_NAMES = {
    "linear": ("lora_A", "lora_B"),
    "conv": ("lora_A", "lora_B"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}


def mark(module: nn.Module, parameter: str | None = None) -> Site:
    """Make a linear layer, an embedding or a convolution a site without adapters, in place.

    Or a `parameter` of the module.

    A site is returned as it is.
    """
    if parameter is not None and is_projection(module, parameter):
        return mark_projection(module, parameter)
    if parameter is not None:
        return mark_parameter(module, parameter)
    if isinstance(module, Site):
        return module
    convolution = is_convolution(module)
    specialise(module, ConvolutionSite if convolution else Site, beneath=OwnOutputs)
    site: Site = module  # type: ignore[assignment]
    other = "conv" if convolution else "linear"
    site.lora_kind = "embedding" if isinstance(module, nn.Embedding) else other
    for name in _NAMES[site.lora_kind]:
        setattr(site, name, nn.ModuleDict().train(site.training))
    site.lora_arithmetic = {}
    site.lora_branches = {}
    site.activate(())
    return site


def sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Yield every site of the model with its dotted name, in module order.

    That is a module's fqn, or a parameter's.
    """
    for fqn, module in outside_adapters(model):
        for name, site in sites_at(module).items():
            yield f"{fqn}.{name}".strip("."), site


def modules_with_sites(model: nn.Module) -> list[str]:
    """Return the fqns of the modules that are sites themselves."""
    return [fqn for fqn, module in outside_adapters(model) if isinstance(module, Site)]


def sites_at(module: nn.Module) -> dict[str, Site]:
    """Return the module itself if it is a site, by no name, and those of its parameters."""
    itself = {"": module} if isinstance(module, Site) else {}
    return {**itself, **parameter_sites(module)}


def site_of(module: nn.Module, name: str) -> Site | None:
    """Return the site whose adapters change a tensor of a module."""
    return parameter_sites(module).get(name) or (module if isinstance(module, Site) else None)


def base_modules(model: nn.Module, itself: bool = False) -> dict[str, nn.Module]:
    """Return the modules of the base model by fqn, without what adapters keep inside them.

    The model itself only if asked for.
    """
    return {fqn: module for fqn, module in outside_adapters(model) if fqn or itself}


def is_of_adapters(name: str) -> bool:
    """Whether a module, or a tensor, is one that adapters keep inside the base's modules."""
    return any(part.startswith("lora_") for part in name.split("."))


def owner_of(fqn: str) -> str | None:
    """Return the adapter that a module inside the base's modules is of."""
    parts = fqn.split(".")
    inside = (i for i, p in enumerate(parts[:-1]) if p.startswith("lora_") and p != SITES)
    return next((parts[i + 1] for i in inside), None)


def insert(
    site: Site,
    adapter: str,
    tensors: Mapping[str, Tensor],
    arithmetic: Arithmetic,
    trainable: bool,
    frozen: Collection[str] = (),
) -> None:
    """Store an adapter at a site; `tensors` as `tensors()` returns them. It is not activated.

    `frozen` are the names of those tensors that never get gradients.
    """
    first, second = _containers(site)
    if site.lora_kind == "embedding":
        A, B, bias = tensors["lora_embedding_A"], tensors["lora_embedding_B"], None
    else:
        A, B, bias = (tensors.get(f"lora_{n}") for n in ("A.weight", "B.weight", "B.bias"))
        assert A is not None
        assert B is not None
    trained = trainable and not any("_A" in name for name in frozen)
    first[adapter] = factor(A, None, trained).train(site.training)
    trained = trainable and not any("_B" in name for name in frozen)
    second[adapter] = factor(B, bias, trained).train(site.training)
    m, v, d, sampler = None, None, None, None
    if MAGNITUDE in tensors:
        m = _held(site, MAGNITUDE, adapter, Vector(tensors[MAGNITUDE], trainable))
    if DIAGONAL in tensors:
        d = _held(site, DIAGONAL, adapter, Vector(tensors[DIAGONAL], trainable))
    if DIRECTION in tensors:
        v = _held(site, DIRECTION, adapter, Direction(tensors[DIRECTION]))
    if f"{SAMPLER}.{PRIORS[0]}" in tensors:
        sampler = _held(site, SAMPLER, adapter, Sampler(tensors, trainable))
    factors: Any = first[adapter], second[adapter]
    more = {"magnitude": m, "direction": v, "diagonal": d, "sampler": sampler}
    site.lora_branches[adapter] = Factors(*factors, **more)
    site.lora_arithmetic[adapter] = arithmetic


def insert_tied(site: Site, adapter: str, embedding: Site, arithmetic: Arithmetic) -> None:
    """Let a layer that shares an embedding's weight share that embedding's adapter too."""
    own = embedding.lora_branches[adapter]
    site.lora_branches[adapter] = Factors(own.A, own.B, tied=True)
    site.lora_arithmetic[adapter] = arithmetic


def compute_as(model: nn.Module, site: Site, adapter: str, arithmetic: Arithmetic) -> None:
    """Let an adapter compute so at a site, and at those that are tied to it; not yet in force."""
    site.lora_arithmetic[adapter] = arithmetic
    if site.lora_kind == "embedding":
        for _, other in sites(model):
            branch = other.lora_branches.get(adapter)
            if branch is not None and branch.A is site.lora_branches[adapter].A:
                other.lora_arithmetic[adapter] = arithmetic


def remove(site: Site, adapter: str) -> None:
    """Delete an adapter's tensors from a site; it must not be active."""
    branch = site.lora_branches.pop(adapter)
    if not branch.tied:
        for container in _containers(site):
            del container[adapter]
    for name in (MAGNITUDE, DIRECTION, DIAGONAL, SAMPLER):
        if name in site._modules and adapter in getattr(site, name):
            del getattr(site, name)[adapter]
    del site.lora_arithmetic[adapter]


def rename(site: Site, old: str, new: str) -> None:
    """Keep an adapter's tensors at a site under another name; it must not be active."""
    for name in (*_containers_of(site), MAGNITUDE, DIRECTION, DIAGONAL, SAMPLER):
        held = site._modules.get(name)
        if isinstance(held, nn.ModuleDict) and old in held:
            held[new] = held[old]
            del held[old]
    site.lora_branches[new] = site.lora_branches.pop(old)
    site.lora_arithmetic[new] = site.lora_arithmetic.pop(old)


def tensors(site: Site, adapter: str) -> dict[str, Tensor]:
    """Return the adapter's own parameters and buffers at a site by PEFT's names in a file.

    `lora_A.weight` (r, in), `lora_B.weight` (out, r), `lora_B.bias` (out,) of a linear layer;
    `lora_embedding_A` (r, rows), `lora_embedding_B` (width, r) of an embedding; a convolution's A
    is (r, in, k…), B (out, r / groups, 1…) and magnitude (1, out, 1…); and of DoRA
    `lora_magnitude_vector` (out,), of VeLoRA `lora_velora_embed`, of KaSA `lora_diag` (r,). A tied
    layer has none of its own.
    """
    factors = site.lora_branches[adapter]
    if factors.tied:
        return {}
    embedding = site.lora_kind == "embedding"
    names = _NAMES[site.lora_kind] if embedding else ("lora_A.weight", "lora_B.weight")
    found: dict[str, Any] = dict(zip(names, (factors.A.weight, factors.B.weight), strict=True))
    if factors.B.bias is not None:
        found["lora_B.bias"] = factors.B.bias
    if factors.magnitude is not None:
        found[MAGNITUDE] = factors.magnitude.weight
    if factors.direction is not None:
        found[DIRECTION] = factors.direction.weight
    if factors.diagonal is not None:
        found[DIAGONAL] = factors.diagonal.weight
    if factors.sampler is not None:
        found |= factors.sampler.tensors()
    return found


def _containers_of(site: Site) -> tuple[str, str]:
    return _NAMES.get(site.lora_kind, _NAMES["linear"])


def _containers(site: Site) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    first, second = _containers_of(site)
    return getattr(site, first), getattr(site, second)


def _held(site: Site, name: str, adapter: str, module: Held) -> Held:
    """Put what some adapters have at a site into its container there."""
    if name not in site._modules:
        setattr(site, name, nn.ModuleDict().train(site.training))
    getattr(site, name)[adapter] = module.train(site.training)
    return module


def factor(weight: Tensor, bias: Tensor | None, trainable: bool) -> Holder:
    """Return the module that holds one factor, and B's bias."""
    rows, columns, *kernel = weight.shape
    how: dict[str, Any] = {"bias": bias is not None, "device": "meta"}
    if kernel:
        make: Any = _CONVOLUTIONS[len(kernel) - 1]
        factor = make(columns, rows, tuple(kernel), **how)
    else:
        factor = nn.Linear(columns, rows, **how)
    factor.weight = nn.Parameter(weight, requires_grad=trainable)
    if bias is not None:
        factor.bias = nn.Parameter(bias, requires_grad=trainable)
    return factor


def base_device(site: Site) -> torch.device:
    """Return the device of the base weight, where its module runs."""
    return device_of(site.lora_place[0], site.weight)


@torch.no_grad()
def overwrite(
    site: Site, adapter: str, values: Mapping[str, Tensor], arithmetic: Arithmetic
) -> None:
    """Copy values of equal shapes into an adapter that is there; its parameters stay the same."""
    for name, parameter in tensors(site, adapter).items():
        parameter.copy_(values[name])
    site.lora_arithmetic[adapter] = arithmetic
