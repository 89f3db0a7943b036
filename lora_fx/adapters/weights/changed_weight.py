"""A base weight that the init of an adapter changes, in storage of its own.

    W_res = W − s B₀ A₀

The site keeps A₀ (r, in) and B₀ (out, r), frozen, as the adapter starts. With the adapter the
module computes `W_res x + s B A x`; without it `W_res x + s B₀ A₀ x`, which is `W x` to rounding,
whatever other adapters do. `Site.branches_with` tells what adds to W_res in either case, and
`original` is W. At most one adapter changes a weight, and none that several modules share.

KaSA takes out what is smallest of the weight, with a scaling of 1, and starts elsewhere.
LoftQ puts a quantised weight there: s B₀ A₀ is as much of what that loses as rank r can hold.

Where the spec quantises the module, W_res is what is packed, and W is had again to what that loses.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import sha256

import torch
from torch import Tensor, nn

from lora_fx.adapters import storage
from lora_fx.adapters.sites.factors import Change, Factors
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights import copies
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.offloaded import values_of
from lora_fx.plan.packed import packing_of, unpacked
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan

_START = ("lora_start_A", "lora_start_B")


def require_changeable(model: nn.Module, plan: AdapterPlan) -> None:
    """Raise LoraFxError if an adapter changes or trains a weight that another one changes.

    And if it changes one that another one trains.
    """
    faults = list(_faults(model, plan))
    if faults:
        raise LoraFxError(faults)


def _faults(model: nn.Module, plan: AdapterPlan) -> Iterator[Diagnostic]:
    for site in plan.sites:
        module = model.get_submodule(site.fqn)
        others = (
            [changer] if (changer := changed_by(module, site.weight)) else _trainers(site, module)
        )
        if site.changes_base and packing_of(module) is not None:
            yield _packed(plan.name, site.fqn)
        for other in others if site.changes_base else ():
            message = f"`{other}` and `{plan.name}` both change the weight of `{site.name}`"
            yield Diagnostic("adapter-conflict", message, help="use one of them in a model")
        if changer and storage.MAGNITUDE in site.tensors:
            yield _norms(plan.name, changer, site.name)
        for other in _with_magnitudes(module, site.weight) if site.changes_base else ():
            yield _norms(other, plan.name, site.name)
    for trained in plan.modules:
        for fqn, module in model.get_submodule(trained.fqn).named_modules():
            found = [changed_by(module, name) for name in module._parameters]
            other = next((adapter for adapter in found if adapter is not None), None)
            if other is not None:
                name = f"{trained.fqn}.{fqn}".strip(".")
                message = f"`{plan.name}` trains `{name}`, the weight of which `{other}` changes"
                yield Diagnostic("adapter-conflict", message, help="use one of them in a model")


def _packed(adapter: str, fqn: str) -> Diagnostic:
    message = f"`{adapter}` changes the weight of `{fqn}`, which is in 4 or 8 bits already"
    help = "compile it over the base in 16 or 32 bits, with `quantize` in the spec"
    return Diagnostic("cannot-apply", message, help=help)


def _norms(adapter: str, changer: str, fqn: str) -> Diagnostic:
    message = f"`{adapter}` has norms of the weight of `{fqn}`, which `{changer}` changes"
    return Diagnostic("adapter-conflict", message, help="use one of them in a model")


def _with_magnitudes(module: nn.Module, weight: str) -> list[str]:
    site = storage.site_of(module, weight)
    branches = {} if site is None else site.lora_branches
    return [name for name, factors in branches.items() if factors.magnitude is not None]


def _trainers(site: SitePlan, module: nn.Module) -> list[str]:
    found = copies.adapters_of(module) if copies.is_held(module) else []
    return [name for name in found if site.weight in copies.tensors(module, name)]


def changed_by(module: nn.Module, name: str = "weight") -> str | None:
    """Return the adapter that changed a weight of a module, None if none did."""
    site = storage.site_of(module, name)
    return None if site is None or site.lora_change is None else site.lora_change.adapter


@torch.no_grad()
def change(
    site: Site,
    adapter: str,
    weight: Tensor | None = None,
    removed: tuple[Tensor, Tensor] | None = None,
    device: torch.device | None = None,
) -> None:
    """Take what an adapter that is here adds out of the base weight.

    Or the product of the A₀ and B₀ that are `removed`. `weight`, in the layout of the base's, is
    put there instead if it is given. Computed on the device, if one is given.
    """
    factors, arithmetic = site.lora_branches[adapter], site.lora_arithmetic[adapter]
    base, arithmetic = fingerprint(site.weight), replace(arithmetic, dropout=0.0)
    own = (factors.A.weight, factors.B.weight)
    kept = own if removed is None else [t.to(like) for t, like in zip(removed, own, strict=True)]
    arithmetic = arithmetic if removed is None else replace(arithmetic, scaling=1.0)
    start = _keep(site, adapter, *(tensor.detach().clone() for tensor in kept))
    how = weight is not None, removed is not None
    site.lora_change = Change(adapter, start, arithmetic, base, *how)
    _put(site, _plus(site, site.weight, -1, device) if weight is None else weight.to(site.weight))


@torch.no_grad()
def rebase(site: Site, A: Tensor, B: Tensor, weight: Tensor | None = None) -> None:
    """Let the adapter that changed the weight have started as these; the base stays what it is.

    `weight` is what that start has left of it, if it is known.
    """
    change = site.lora_change
    assert change is not None
    arithmetic = replace(site.lora_arithmetic[change.adapter], dropout=0.0)
    arithmetic = change.arithmetic if change.removed else arithmetic
    old = (change.factors.A.weight, change.factors.B.weight)
    same = all(torch.equal(a, b.to(a)) for a, b in zip(old, (A, B), strict=True))
    if same and arithmetic.scaling == change.arithmetic.scaling and weight is None:
        return
    if packing_of(site) is not None:
        message = "what an adapter has taken out of a weight in 4 or 8 bits cannot be another part"
        help = "compile the spec anew, over the base in 16 or 32 bits"
        raise LoraFxError((Diagnostic("cannot-apply", message, help=help),))
    base = _plus(site, site.weight.double(), 1)
    new = [value.to(like).clone() for value, like in zip((A, B), old, strict=True)]
    start = _keep(site, change.adapter, *new)
    site.lora_change = replace(
        change, factors=start, arithmetic=arithmetic, replaced=weight is not None
    )
    _put(site, (_plus(site, base, -1) if weight is None else weight).to(site.weight))


def rebase_by_name(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let adapters have started as A₀ and B₀ in a model's state say, under its own names."""
    for fqn, site in model.named_modules():
        if isinstance(site, Site) and site.lora_change is not None:
            names = (f"{fqn}.{name}.{site.lora_change.adapter}.weight" for name in _START)
            rebase(site, *(state[name] for name in names))


@torch.no_grad()
def restore(site: Site, dtype: torch.dtype | None = None) -> None:
    """Put back what the adapter that changed the weight took out of it; to rounding.

    A weight in 4 or 8 bits is rounded to these again; with a `dtype` given it is one of that dtype.
    """
    if packing_of(site) is not None and dtype is not None:
        from lora_fx.adapters.weights.dequantise import make_plain  # imports bitsandbytes

        make_plain(site, {"weight": original(site).to(dtype)})
    elif packing_of(site) is not None:
        from lora_fx.adapters.weights.quantise import pack_again  # imports bitsandbytes

        pack_again(site, original(site))
    else:
        _put(site, _plus(site, site.weight, 1))
    site.lora_change = None
    for name in _START:
        delattr(site, name)
    site.activate(site.lora_active)


def original(module: nn.Module, name: str = "weight") -> Tensor:
    """Return a base weight as it was before an adapter changed it: exactly, or to rounding."""
    weight, site = copies.base_tensor(module, name), storage.site_of(module, name)
    assert weight is not None
    packed = name == "weight" and packing_of(module) is not None
    if site is not None and site.lora_change is not None:
        return _plus(site, unpacked(module) if packed else weight.detach(), 1)
    return unpacked(module) if packed else values_of(module, name, weight)


def fingerprint_of_base(module: nn.Module, name: str = "weight") -> str:
    """Return the fingerprint of a module's weight before any adapter changed it."""
    site = storage.site_of(module, name)
    if site is not None and site.lora_change is not None:
        return site.lora_change.base
    return fingerprint(original(module, name))


def fingerprint(weight: Tensor) -> str:
    """Return dtype, shape and a hash of the values, which a meta tensor has none of."""
    data = b""
    if not weight.is_meta:
        data = weight.detach().cpu().contiguous().view(torch.uint8).numpy().data
    shape = "x".join(map(str, weight.shape))
    return f"{str(weight.dtype).removeprefix('torch.')} {shape} {sha256(data).hexdigest()}"


def _plus(site: Site, weight: Tensor, sign: int, device: torch.device | None = None) -> Tensor:
    """Return weight ± s B₀ A₀, computed in float64, in the dtype and layout of `weight`.

    It lies where `weight` does; computed there, or on the device that is given.
    """
    change = site.lora_change
    assert change is not None
    factors = change.factors.A.weight, change.factors.B.weight
    where = device or weight.device
    A, B = (factor.detach().to(where, torch.float64).flatten(1) for factor in factors)
    delta = sign * change.arithmetic.scaling * (B @ A)
    delta = delta.T if site.lora_turned else delta.view(weight.shape)
    result = (weight.detach().to(where, torch.float64) + delta).to(weight.dtype)
    return result.to(weight.device)


def _keep(site: Site, adapter: str, A: Tensor, B: Tensor) -> Factors:
    factors = Factors(storage.factor(A, None, False), storage.factor(B, None, False))
    for name, factor in zip(_START, (factors.A, factors.B), strict=True):
        setattr(site, name, nn.ModuleDict({adapter: factor}).train(site.training))
    return factors


def _put(site: Site, weight: Tensor) -> None:
    """Make this the base weight: a new Parameter, so that the one that was there stays as it is."""
    (owner, name), trained = site.lora_place, site.weight.requires_grad
    owner._parameters[name] = nn.Parameter(weight.contiguous(), requires_grad=trained)
    site.keep_room()
