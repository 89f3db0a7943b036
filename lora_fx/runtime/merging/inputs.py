"""What is read to merge adapters into the weight of one site."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from lora_fx.adapters.sites.parameter_site import ParameterSite
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights.merged import source, weight_for
from lora_fx.graph.structure import Branch, Structure


@dataclass(frozen=True)
class MergeInputs:
    """What is read to merge at one site: `factors` are A, B and B's bias of each adapter."""

    adapters: tuple[str, ...]
    structure: Structure
    weight: Tensor
    factors: tuple[Tensor, ...]
    scalings: tuple[float, ...]
    bias: Tensor | None

    @classmethod
    def of(cls, site: Site, adapters: Sequence[str], weight: Tensor | None = None) -> "MergeInputs":
        """Return those of adapters that the site has, into `weight` if it is given."""
        here = tuple(name for name in adapters if name in site.lora_branches)
        branches = [site.lora_branches[name] for name in here]
        weight = weight_for(site, adapters) if weight is None else weight
        factors = tuple(tensor for branch in branches for tensor in branch.tensors())
        has_bias = any(branch.has_bias for branch in branches)
        return cls(
            here,
            Structure(_kind(site), tuple(Branch(b.rank, bias=b.has_bias) for b in branches)),
            weight.detach(),
            tuple(factor.detach() for factor in factors),
            tuple(site.lora_arithmetic[name].scaling for name in here),
            source(site, "bias", adapters).detach() if has_bias else None,
        )

    def of_expert(self, site: ParameterSite, expert: int, weight: Tensor) -> "MergeInputs":
        """Return the inputs of one of the experts in a stack, whose weight is given."""
        pairs = zip(self.factors[::2], self.factors[1::2], strict=True)
        split = [factor[expert] for A, B in pairs for factor in site.split(A, B)]
        branches = tuple(Branch(A.shape[0]) for A in split[::2])
        structure = Structure(self.structure.kind, branches)
        own = {"structure": structure, "weight": weight, "factors": tuple(split)}
        return replace(self, **own)

    @property
    def has_rows(self) -> bool:
        """Return whether rows of the weight can be merged by themselves: it is a matrix alone."""
        is_matrix = self.structure.kind in ("linear", "transposed") and self.weight.ndim == 2
        return is_matrix and self.bias is None

    def of_rows(self, start: int, rows: Tensor) -> "MergeInputs":
        """Return the inputs of some rows of the weight, which `has_rows`; these are given."""
        As, Bs, end = self.factors[::2], self.factors[1::2], start + len(rows)
        if self.structure.kind == "linear":
            Bs = tuple(B[start:end] for B in Bs)
        else:
            As = tuple(A[:, start:end] for A in As)
        factors = tuple(factor for pair in zip(As, Bs, strict=True) for factor in pair)
        return replace(self, weight=rows, factors=factors)

    def tensors(self) -> list[Tensor]:
        """Return all; scalings in the widest dtype, on the CPU, from where no kernel waits."""
        dtypes = (self.weight.dtype, torch.float32, *(factor.dtype for factor in self.factors))
        scalings = torch.tensor(self.scalings, dtype=reduce(torch.promote_types, dtypes))
        bias = () if self.bias is None else (self.bias,)
        return [self.weight, *self.factors, scalings, *bias]

    def names(self, site: Site) -> list[str]:
        """Return the names of the tensors beside the site; scalings have none.

        The weight of a parameter's site is the parameter itself.
        """
        A, B = ("lora_embedding_A", "lora_embedding_B")
        if self.structure.kind != "embedding":
            A, B = "lora_A", "lora_B"
        names = ["." if isinstance(site, ParameterSite) else "weight"]
        for adapter, branch in zip(self.adapters, self.structure.branches, strict=True):
            names += [f"{A}.{adapter}.weight", f"{B}.{adapter}.weight"]
            names += [f"{B}.{adapter}.bias"] if branch.bias else []
        return [*names, "", *(() if self.bias is None else ("bias",))]


def is_product(site: Site, adapter: str) -> bool:
    """Return whether what an adapter adds to the weight is s B A as its factors lie in memory."""
    branch, arithmetic = site.lora_branches[adapter], site.lora_arithmetic[adapter]
    whole = branch.magnitude is None and branch.diagonal is None
    return whole and arithmetic.blocks == (1, 1)


def _kind(site: Site) -> str:
    turned = site.lora_turned and site.lora_kind in ("linear", "parameter")
    return "transposed" if turned else site.lora_kind.replace("parameter", "linear")
