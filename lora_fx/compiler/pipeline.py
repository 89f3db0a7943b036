"""The pipeline of a captured graph, on one screen.

captured graph → adapted → fused → lowered → compiled
"""

import copy
from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.fx import GraphModule

from lora_fx.graph import backends
from lora_fx.graph.inputs import name_inputs, tensor_names
from lora_fx.graph.program import Program
from lora_fx.graph.verify import STAGES, Stage, verify
from lora_fx.passes.aten.accumulate_products import accumulate_products
from lora_fx.passes.aten.augment_products import augment_products
from lora_fx.passes.aten.fuse_low_rank_terms import fuse_low_rank_terms
from lora_fx.passes.aten.keep_float32 import keep_float32
from lora_fx.passes.aten.part_columns import part_columns
from lora_fx.passes.aten.share_gradient_reads import share_gradient_reads
from lora_fx.passes.causal_attention import causal_attention
from lora_fx.passes.drop_in_kernel import drop_in_kernel
from lora_fx.passes.factor_dora_norm import factor_dora_norm
from lora_fx.passes.grouped_attention import grouped_attention
from lora_fx.passes.join_picked import join_picked
from lora_fx.passes.lower import lower
from lora_fx.passes.share_choices import share_choices
from lora_fx.passes.share_shrinks import share_shrinks
from lora_fx.rewrite.driver import apply
from lora_fx.rules.expand_sites import ExpandSites
from lora_fx.rules.gather_samples import GatherSamples
from lora_fx.rules.join_branches import JoinBranches
from lora_fx.rules.pick_in_kernel import PickInKernel
from lora_fx.runtime.provenance import annotate
from lora_fx.runtime.units.uncalled import require_called
from lora_fx.spec.spec import CompileSpec

Backend = Literal["inductor", "eager"]

RULES = (PickInKernel(), GatherSamples(), JoinBranches(), ExpandSites())
FUSE = (
    factor_dora_norm,
    share_shrinks,
    drop_in_kernel,
    share_choices,
    join_picked,
    causal_attention,
    grouped_attention,
)
PLAIN = (share_gradient_reads, accumulate_products, fuse_low_rank_terms, keep_float32, part_columns)
AUGMENTED = (*PLAIN[:2], augment_products, *PLAIN[2:])


class Pipeline:
    """The `torch.compile` backend of one compiled model."""

    def __init__(self, model: nn.Module, backend: Backend, compile: CompileSpec) -> None:
        self._model = model
        self._backend = backend
        self._mode = compile.mode
        self._augmented = compile.layout == "augmented"
        self._budget = 1.0 if compile.budget is None else compile.budget
        self.seen: Callable[[Program], None] | None = None  # called with each captured graph

    def __call__(self, module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Rewrite a captured graph and hand it on."""
        prepare(module, inputs, self._model)
        if self.seen is not None:
            self.seen(Program(copy.deepcopy(module), "", rewrite))
        rewrite(module, "lowered")
        if self._backend == "eager":
            return backends.eager(module)
        passes = AUGMENTED if self._augmented else PLAIN
        return backends.inductor(module, inputs, self._mode, passes, self._budget)


def prepare(module: GraphModule, inputs: list[Any], model: nn.Module) -> None:
    """Give a captured graph the names and provenance that the model knows."""
    name_inputs(module, inputs, tensor_names(model))
    plan = model.lora_fx_plan
    annotate(module, {(site.name, site.adapter): site for site in plan.sites})  # type: ignore[union-attr]
    verify(module, "captured", "capture")
    require_called(module, inputs, model)


def rewrite(module: GraphModule, stage: Stage) -> GraphModule:
    """Take a captured graph to a stage, in place."""
    wanted = STAGES.index(stage)
    if wanted >= STAGES.index("adapted"):
        for rule in RULES:
            apply((rule,), module)
        verify(module, "adapted", "rules")
    if wanted >= STAGES.index("fused"):
        for fuse in FUSE:
            fuse(module)
            verify(module, "fused", fuse.__name__)
    if wanted >= STAGES.index("lowered"):
        lower(module)
        verify(module, "lowered", "lower")
    return module
