"""The program that merges adapters: a graph over weights, apart from those of the model.

    captured   %w = lora_fx.merge(@q_proj.weight, [@…lora_A…, @…lora_B…], %scalings, structure)
    adapted    a chain of `delta`s, one for each adapter       rules/expand_merges.py
    fused      one `delta` of the summed rank                  passes/join_deltas.py
    lowered    addmm                                           passes/lower.py

W' = W + Σᵢ sᵢ Bᵢ Aᵢ and b' = b + Σᵢ sᵢ βᵢ, in the widest dtype of all and at least float32, rounded
once to that of the weight: W is read once and W' written once, whatever the number of adapters.
Of a stack of experts it is the program of one expert, and it runs for one after the other. On a GPU
one kernel does the same for all sites that it takes: `together.py`.
"""

import operator
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch.fx import Graph, GraphModule, Node

from lora_fx.adapters.sites.parameter_site import ParameterSite
from lora_fx.adapters.sites.site import Site
from lora_fx.graph import ops
from lora_fx.graph.program import Program
from lora_fx.graph.structure import Branch, Structure
from lora_fx.graph.text import FQN
from lora_fx.graph.verify import STAGES, Stage, verify
from lora_fx.passes.join_deltas import join_deltas
from lora_fx.passes.lower import lower
from lora_fx.plan.sites import SitePlan
from lora_fx.rewrite.driver import apply
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype
from lora_fx.rules.expand_merges import ExpandMerges
from lora_fx.runtime.merging.inputs import MergeInputs

Planned = Mapping[tuple[str, str], SitePlan]


def merge_program(
    sites: Mapping[str, Site], adapters: Sequence[str], planned: Planned, within: str = ""
) -> Program:
    """Return the program that merges these adapters into some sites, given by fqn."""
    graph, results = Graph(), []
    for fqn, site in sites.items():
        inputs = MergeInputs.of(site, adapters)
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
def lowered(
    structure: Structure, signature: tuple[tuple[torch.Size, torch.dtype], ...]
) -> GraphModule:
    """Return the program of one site, for tensors of these shapes and dtypes."""
    graph = Graph()
    nodes = [_placeholder(graph, "", *shape_and_dtype) for shape_and_dtype in signature]
    module = rewrite(_finished(graph, _merge(graph, structure, nodes)), "fused")
    lower(module)
    return module


def _placeholder(graph: Graph, name: str, shape: torch.Size, dtype: torch.dtype) -> Node:
    node = graph.placeholder(name.replace(".", "_") or f"scalings_{len(graph.nodes)}")
    node.meta[EXAMPLE] = torch.empty(shape, dtype=dtype, device="meta")
    if name:
        node.meta[FQN] = name
    return node


def _finished(graph: Graph, results: Sequence[Node]) -> GraphModule:
    graph.output(tuple(results))
    return GraphModule(torch.nn.Module(), graph)
