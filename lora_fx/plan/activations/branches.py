"""What a plan trains, on a model without weights, so that its forward keeps what that needs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.graph.convolution import Window, convolution, pointwise
from lora_fx.plan.sites import SitePlan

_MAGNITUDE, _DIAGONAL = _OTHERS = ("lora_magnitude_vector", "lora_diag")


def add_branch(tree: nn.Module, site: SitePlan, trained: Sequence[str]) -> None:
    """Add a site's branch to its module; `trained` are the names of the tensors that are trained.

        y + s * B A drop(x)    times a magnitude for DoRA

    Hu et al. 2021, arXiv 2106.09685, eq. 3; Liu et al. 2024, arXiv 2402.09353, eq. 5. Parameters
    keep what a trained W would, the input; `nn.MultiheadAttention` is adapted by W + s * BA. Other
    variants count as plain LoRA, with the tensors that they add to it.
    """
    module = tree.get_submodule(site.fqn)
    if site.layer.kind not in ("attention", "parameter"):
        branch = _Branch(site, trained)
        module.add_module(f"branch_{site.adapter}", branch)
        module.register_forward_hook(branch)
    elif trained and site.parameter is not None:
        train_parameter(module, site.parameter)
    elif trained:
        train(module)


def train(module: nn.Module) -> None:
    """Train a copy of a module's parameters; a parameter it shares with others stays theirs."""
    for owner in module.modules():
        for name, _ in owner.named_parameters(recurse=False):
            train_parameter(owner, name)


def train_parameter(owner: nn.Module, name: str) -> None:
    """Put a trained copy in the place of a parameter."""
    setattr(owner, name, nn.Parameter(torch.empty_like(owner.get_parameter(name))))


class _Branch(nn.Module):
    """The low-rank branch of a site, called with the module that it stands at and its output."""

    def __init__(self, site: SitePlan, trained: Sequence[str]) -> None:
        super().__init__()
        self._site = site

        def parameter(name: str, shape: tuple[int, ...]) -> nn.Parameter:
            values = torch.empty(shape, dtype=getattr(torch, site.dtype), device="meta")
            return nn.Parameter(values, requires_grad=name in trained)

        (a, shape_a), (b, shape_b) = site.layer.shapes(site.rank).items()
        self.A = parameter(a, shape_a)
        self.B = parameter(b, shape_b)
        self.others = nn.ParameterDict(
            {n: parameter(n, shape) for n, shape in site.tensors.items() if n in _OTHERS}
        )

    def forward(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the output with the branch added."""
        output = output + self._delta(module, args[0], output).to(output.dtype)
        if _MAGNITUDE in self.others:
            output = output * self.others[_MAGNITUDE].to(output.dtype)
        return output

    def _delta(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        site = self._site
        floating = x if x.is_floating_point() else output
        dtype = floating.dtype if site.compute == "activation" else getattr(torch, site.compute)
        A, B = self.A.to(dtype), self.B.to(dtype)
        if site.layer.kind == "embedding":
            return F.linear(F.embedding(x, A.T) * site.scaling, B)
        if site.dropout:
            x = F.dropout(x, site.dropout, training=True)
        x = x.to(dtype)
        if site.layer.kind == "conv":
            return self._convolved(module, x, A, B)
        h = F.linear(x, A)
        if _DIAGONAL in self.others:
            h = h * self.others[_DIAGONAL].to(dtype)
        return F.linear(h * site.scaling, B)

    def _convolved(self, module: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        h = convolution(x, A, Window.of(module))
        return pointwise(h * self._site.scaling, B, None)
