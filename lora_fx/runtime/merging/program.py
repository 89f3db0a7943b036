"""The program that merges adapters: a graph over weights, apart from those of the model.

    captured   %w = lora_fx.merge(@q_proj.weight, [@…lora_A…, @…lora_B…], %scalings, structure)
    adapted    a chain of `delta`s, one for each adapter       rules/expand_merges.py
    fused      one `delta` of the summed rank                  passes/join_deltas.py
    lowered    addmm; on a GPU one kernel                      passes/merge_in_one_kernel.py

W' = W + Σᵢ sᵢ Bᵢ Aᵢ and b' = b + Σᵢ sᵢ βᵢ, in the widest dtype of all and at least float32, rounded
once to that of the weight: W is read once and W' written once, whatever the number of adapters.
Of a stack of experts it is the program of one expert, and it runs for one after the other.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from lora_fx.adapters.sites.magnitudes import effective_delta
from lora_fx.adapters.sites.parameter_site import ParameterSite
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights.merged import source, weight_for
from lora_fx.graph import ops
from lora_fx.graph.exact import exact_products
from lora_fx.graph.program import Program
from lora_fx.graph.structure import Branch, Structure
from lora_fx.graph.text import FQN
from lora_fx.graph.verify import STAGES, Stage, verify
from lora_fx.passes.join_deltas import join_deltas
from lora_fx.passes.lower import lower
from lora_fx.passes.merge_in_one_kernel import merge_in_one_kernel
from lora_fx.plan.sites import SitePlan
from lora_fx.rewrite.driver import apply
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype
from lora_fx.rules.expand_merges import ExpandMerges

Planned = Mapping[tuple[str, str], SitePlan]


@torch.no_grad()
@exact_products()
def run(site: Site, adapters: Sequence[str], weight: Tensor | None = None) -> dict[str, Tensor]:
    """Return what a site's tensors are with these adapters merged into them, by name.

    With `weight` given, that is merged into instead of the site's own.
    """
    if not all(is_product(site, name) for name in adapters if name in site.lora_branches):
        return _dense(site, adapters, weight)
    name = site.lora_place[1]
    inputs = _Inputs.of(site, adapters, weight)
    if isinstance(site, ParameterSite) and inputs.weight.ndim > 2:
        merged = torch.empty_like(inputs.weight)
        for expert, weight in enumerate(inputs.weight):
            (merged[expert],) = _run(inputs.of_expert(site, expert, weight))
        return {name: merged}
    return dict(zip((name, "bias"), _run(inputs), strict=False))


@torch.no_grad()
@exact_products()
def run_expert(site: ParameterSite, adapters: Sequence[str], weight: Tensor, expert: int) -> Tensor:
    """Return what the weight of one expert in a stack is with these adapters merged into it."""
    (merged,) = _run(_Inputs.of(site, adapters, weight).of_expert(site, expert, weight))
    return merged


def _run(inputs: "_Inputs") -> Sequence[Tensor]:
    tensors = inputs.tensors()
    signature = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
    on_gpu = inputs.weight.is_cuda and all(factor.is_cuda for factor in inputs.factors)
    return _lowered(inputs.structure, signature, on_gpu)(*tensors)


def is_product(site: Site, adapter: str) -> bool:
    """Return whether what an adapter adds to the weight is s B A as its factors lie in memory."""
    branch, arithmetic = site.lora_branches[adapter], site.lora_arithmetic[adapter]
    whole = branch.magnitude is None and branch.diagonal is None
    return whole and arithmetic.blocks == (1, 1)


def _dense(site: Site, adapters: Sequence[str], weight: Tensor | None) -> dict[str, Tensor]:
    """Merge adapters whose deltas are no products: W + Σ of what each alone adds to W (DoRA).

    W is what they are merged into: where one of them trains the weight, norms are of its own.
    """
    given = weight_for(site, adapters) if weight is None else weight
    here = [name for name in adapters if name in site.lora_branches]
    W = given.detach().t() if site.lora_turned else given.detach().flatten(1)
    deltas = [effective_delta(site, name, W) for name in here]
    wide = reduce(torch.promote_types, (given.dtype, *(delta.dtype for delta in deltas)))
    total = sum(deltas[1:], deltas[0]).to(wide)
    delta = total.t() if site.lora_turned else total.view(given.shape)
    results = {site.lora_place[1]: given.to(wide) + delta}
    biased = [name for name in here if site.lora_branches[name].has_bias]
    if biased:
        results["bias"] = source(site, "bias", adapters).to(wide)
        for name in biased:
            bias = site.lora_branches[name].B.bias
            assert bias is not None
            results["bias"] = results["bias"] + site.lora_arithmetic[name].scaling * bias
    return {name: tensor.to(given.dtype) for name, tensor in results.items()}


def merge_program(
    sites: Mapping[str, Site], adapters: Sequence[str], planned: Planned, within: str = ""
) -> Program:
    """Return the program that merges these adapters into some sites, given by fqn."""
    graph, results = Graph(), []
    for fqn, site in sites.items():
        inputs = _Inputs.of(site, adapters)
        if isinstance(site, ParameterSite) and inputs.weight.ndim > 2:
            inputs = inputs.of_expert(site, 0, inputs.weight[0])
        nodes = [
            _placeholder(graph, name and f"{fqn}.{name}".strip("."), tensor.shape, tensor.dtype)
            for name, tensor in zip(inputs.names(site), inputs.tensors(), strict=True)
        ]
        results += _merge(graph, inputs.structure, nodes)
        lines = (planned[fqn, a].rule for a in inputs.adapters if (fqn, a) in planned)
        spec = ", ".join(dict.fromkeys(f"{line.source.name}:{line.line}" for line in lines))
        described = {"adapters": ", ".join(inputs.adapters), "spec": spec}
        for node in graph.nodes:
            if node.op == "call_function" and "lora_fx" not in node.meta:
                node.meta["lora_fx"] = {key: value for key, value in described.items() if value}
    return Program(_finished(graph, results), within, rewrite)


def rewrite(module: GraphModule, stage: Stage) -> GraphModule:
    """Take a captured merge program to a stage, in place."""
    wanted = STAGES.index(stage)
    if wanted >= STAGES.index("adapted"):
        apply((ExpandMerges(),), module)
        verify(module, "adapted", "rules")
    if wanted >= STAGES.index("fused"):
        join_deltas(module)
        verify(module, "fused", "join_deltas")
    if wanted >= STAGES.index("lowered"):
        lower(module)
        verify(module, "lowered", "lower")
    return module


@dataclass(frozen=True)
class _Inputs:
    """What is read to merge at one site: `factors` are A, B and B's bias of each adapter."""

    adapters: tuple[str, ...]
    structure: Structure
    weight: Tensor
    factors: tuple[Tensor, ...]
    scalings: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, site: Site, adapters: Sequence[str], weight: Tensor | None = None) -> "_Inputs":
        here = tuple(name for name in adapters if name in site.lora_branches)
        branches = [site.lora_branches[name] for name in here]
        weight = weight_for(site, adapters) if weight is None else weight
        factors = tuple(tensor for branch in branches for tensor in branch.tensors())
        dtypes = (weight.dtype, torch.float32, *(factor.dtype for factor in factors))
        wide = reduce(torch.promote_types, dtypes)
        scalings = [site.lora_arithmetic[name].scaling for name in here]
        has_bias = any(branch.has_bias for branch in branches)
        return cls(
            here,
            Structure(_kind(site), tuple(Branch(b.rank, bias=b.has_bias) for b in branches)),
            weight.detach(),
            tuple(factor.detach() for factor in factors),
            torch.tensor(scalings, dtype=wide),  # on the CPU, from where no kernel waits for it
            source(site, "bias", adapters).detach() if has_bias else None,
        )

    def of_expert(self, site: ParameterSite, expert: int, weight: Tensor) -> "_Inputs":
        """Return the inputs of one of the experts in a stack, whose weight is given."""
        pairs = zip(self.factors[::2], self.factors[1::2], strict=True)
        split = [factor[expert] for A, B in pairs for factor in site.split(A, B)]
        branches = tuple(Branch(A.shape[0]) for A in split[::2])
        structure = Structure(self.structure.kind, branches)
        own = {"structure": structure, "weight": weight, "factors": tuple(split)}
        return replace(self, **own)

    def tensors(self) -> list[Tensor]:
        bias = () if self.bias is None else (self.bias,)
        return [self.weight, *self.factors, self.scalings, *bias]

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


def _kind(site: Site) -> str:
    turned = site.lora_turned and site.lora_kind in ("linear", "parameter")
    return "transposed" if turned else site.lora_kind.replace("parameter", "linear")


def _merge(graph: Graph, structure: Structure, inputs: Sequence[Node]) -> list[Node]:
    """Add what merges at one site; return the new weight and, if it changes, the new bias."""
    of_branches = sum(2 + branch.bias for branch in structure.branches)
    weight, factors, scalings = inputs[0], inputs[1 : 1 + of_branches], inputs[1 + of_branches]
    products = Structure(structure.kind, tuple(Branch(b.rank) for b in structure.branches))
    dealt = structure.params(factors)
    params = [factor for A, B, *_ in dealt for factor in (A, B)]
    results = [_merged(graph, weight, params, scalings, products)]
    bias = inputs[2 + of_branches :]
    if bias:
        value = call(graph, "to", bias[0], dtype(scalings))
        for index, (_, _, own, *_) in enumerate(dealt):
            if own is not None:
                scaling = call(graph, operator.getitem, scalings, index)
                value = call(graph, torch.add, value, call(graph, torch.mul, own, scaling))
        results.append(call(graph, "to", value, dtype(bias[0])))
    return results


def _merged(
    graph: Graph, weight: Node, params: list[Node], scalings: Node, products: Structure
) -> Node:
    """Add the merge into the weight; a convolution's tensors are seen as matrices."""
    if products.kind != "conv":
        return call(graph, ops.merge, weight, params, scalings, str(products))
    shape = weight.meta[EXAMPLE].shape
    weight, *params = (call(graph, torch.flatten, tensor, 1) for tensor in (weight, *params))
    value = call(graph, ops.merge, weight, params, scalings, str(products))
    return call(graph, torch.reshape, value, tuple(shape))


@cache
def _lowered(
    structure: Structure, signature: tuple[tuple[torch.Size, torch.dtype], ...], on_gpu: bool
) -> GraphModule:
    graph = Graph()
    nodes = [_placeholder(graph, "", *shape_and_dtype) for shape_and_dtype in signature]
    module = rewrite(_finished(graph, _merge(graph, structure, nodes)), "fused")
    if on_gpu:
        merge_in_one_kernel(module)
    return rewrite(module, "lowered")


def _placeholder(graph: Graph, name: str, shape: torch.Size, dtype: torch.dtype) -> Node:
    node = graph.placeholder(name.replace(".", "_") or f"scalings_{len(graph.nodes)}")
    node.meta[EXAMPLE] = torch.empty(shape, dtype=dtype, device="meta")
    if name:
        node.meta[FQN] = name
    return node


def _finished(graph: Graph, results: Sequence[Node]) -> GraphModule:
    graph.output(tuple(results))
    return GraphModule(torch.nn.Module(), graph)
