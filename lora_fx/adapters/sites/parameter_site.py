"""A parameter with adapters: a matrix of any module, or a stack of them, one for each expert.

The module that owns it gets a subclass of its class that hands out an `AdaptedWeight` where the
parameter is read, and a child, `lora_parameters`, with a site for each such parameter.
"""

import sys
from functools import cache
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.dynamic_class import specialise
from lora_fx.adapters.sites.adapted_weight import AdaptedWeight
from lora_fx.adapters.sites.choice import Added, Choice
from lora_fx.adapters.sites.routed_rows import RowsFollowed
from lora_fx.adapters.sites.site import Site
from lora_fx.graph.structure import Branch, Structure
from lora_fx.plan.kinds import Layer, parameter_layer

SITES = "lora_parameters"
_KINDS = ("linear", "batched", "grouped")
_MIXIN = "Reads_"


class ParameterSite(Site, nn.Module):
    """The adapters of one parameter of `owner`; what they compute, `AdaptedWeight` says.

    A (E r, in) holds the experts one after the other, B (out, r E) has rank ρ of expert e in column
    ρ E + e: PEFT's `target_parameters`.
    """

    lora_shown: bool = False
    lora_keys: dict[str, str]
    lora_mixed_keys: dict[str, str]

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self._owner = (owner, name)  # in a tuple, or `owner` would be a child
        layer = parameter_layer(owner, self.weight)
        assert layer is not None
        self.lora_layer: Layer = layer
        self.lora_kind = "parameter"
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_arithmetic, self.lora_branches = {}, {}
        self.train(owner.training)
        self.activate(())

    @property
    def lora_place(self) -> tuple[nn.Module, str]:
        """The module that owns the parameter, and its name there."""
        return self._owner

    @property
    def lora_turned(self) -> bool:
        """Whether the matrices are (in, out)."""
        return self.lora_layer.turned

    def lora_rank(self, adapter: str) -> int:
        """Return the inner dimension of an adapter's branches, one for each expert."""
        return self.lora_branches[adapter].rank // self.lora_layer.experts

    @property
    def lora_name(self) -> str:
        """The parameter in words."""
        owner, name = self._owner
        return f"{type(owner).__name__}.{name}"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The parameter in force."""
        owner, name = self._owner
        parameter = owner._parameters[name]
        assert parameter is not None
        return parameter

    def activate(self, adapters: tuple[str, ...], in_weights: tuple[str, ...] = ()) -> None:
        """Let these adapters, of those present here, take part wherever the parameter is read."""
        self.lora_in_weights = in_weights
        self.lora_active = tuple(name for name in adapters if name in self.lora_arithmetic)
        self.lora_choice = self._choose([Added(*one) for one in self.branches_with(adapters)])
        self.lora_keys = self._keys(self.lora_choice)
        self._place_choices()

    def route(self, adapters: tuple[str, ...], terms: int) -> None:
        """Say which adapter each column of the shares of a mixed batch is of."""
        super().route(adapters, terms)
        assert self.lora_mixed is not None
        self.lora_mixed_keys = self._keys(self.lora_mixed, terms)

    def _keys(self, choice: Choice, terms: int = 0) -> dict[str, str]:
        """Return the structure of these branches, of one expert, by how they are computed."""
        experts = self.lora_layer.experts
        branches = tuple(
            Branch(one.factors.rank // experts, compute=one.arithmetic.compute, column=one.column)
            for one in choice.added
        )
        return {kind: str(Structure(kind, branches, terms=terms)) for kind in _KINDS}

    def read(self) -> Any:
        """Return what the model gets when it reads the parameter, unless it is `lora_shown`."""
        if self.lora_shown or not self.adds:
            return self.weight
        mixed = self.lora_adds_mixed is not None
        added = (self.lora_mixed if mixed else self.lora_choice).added  # type: ignore[union-attr]
        factors = [self.split(one.factors.A.weight, one.factors.B.weight) for one in added]
        return AdaptedWeight(self.weight, factors, self, self.lora_layer.turned, mixed)

    def split(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of each expert: A (E, r, in), B (E, out, r). Of a matrix, as given."""
        if self.weight.ndim < 3:
            return A, B
        E = self.lora_layer.experts
        split = B.view(B.shape[0], -1, E).permute(2, 0, 1)
        return A.view(E, -1, A.shape[1]), split


def join(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of a stack as they lie in a site and a file: the inverse of `split`."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def mark_parameter(
    owner: nn.Module, name: str, kind: type[ParameterSite] = ParameterSite
) -> ParameterSite:
    """Make a parameter a site without adapters, in place. A site is returned as it is."""
    if SITES not in owner._modules:
        setattr(owner, SITES, nn.ModuleDict().train(owner.training))
        if kind is ParameterSite:
            specialise(owner, RowsFollowed)
    sites = owner._modules[SITES]
    assert isinstance(sites, nn.ModuleDict)
    if name not in sites:
        sites[name] = kind(owner, name)
        specialise(owner, _reading(name))
    site = sites[name]
    assert isinstance(site, ParameterSite)
    return site


def parameter_sites(module: nn.Module) -> dict[str, ParameterSite]:
    """Return the sites of a module's own parameters by their names, in the module's order."""
    sites = module._modules.get(SITES)
    if not isinstance(sites, nn.ModuleDict):
        return {}
    return {name: sites[name] for name in module._parameters if name in sites}  # type: ignore[misc]


@cache
def _reading(name: str) -> type:
    """Return the mixin under which a module reads its parameter through the site."""

    def read(self: nn.Module) -> Any:
        return self._modules[SITES][name].read()  # type: ignore[index]

    return type(f"{_MIXIN}{name}", (), {name: property(read), "__module__": __name__})


def __getattr__(name: str) -> type:
    """Find the mixins for pickle, which looks for classes in their modules."""
    if name.startswith(_MIXIN):
        return _reading(name.removeprefix(_MIXIN))
    raise AttributeError(f"module {sys.modules[__name__].__name__} has no attribute {name}")
