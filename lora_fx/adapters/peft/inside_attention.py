"""What an adapter has inside an `nn.MultiheadAttention`, which PEFT wraps as a whole.

attn.lora_A.weight                               of `in_proj_weight`
attn.base_layer.out_proj.lora_A.weight           of `out_proj`
"""

from collections.abc import Container

from torch import nn

from lora_fx.adapters import storage
from lora_fx.adapters.sites.attention_site import AttentionSite
from lora_fx.adapters.sites.site import Site
from lora_fx.plan.rules import AdapterPlan


def in_file(fqn: str, attentions: Container[str]) -> str:
    """Return a module's name in a file of an adapter that adapts these attentions."""
    around, _, own = fqn.rpartition(".")
    return f"{around}.base_layer.{own}" if around in attentions else fqn


def planned_attentions(plan: AdapterPlan) -> set[str]:
    """Return the fqns of the attentions that an adapter adapts."""
    return {site.target for site in plan.sites if site.layer.kind == "attention"}


def adapted_attentions(model: nn.Module, adapter: str) -> set[str]:
    """Return the fqns of the attentions that an adapter of a model adapts as a whole."""
    modules = storage.base_modules(model).items()
    marked = {fqn: m.out_proj for fqn, m in modules if isinstance(m, AttentionSite)}
    return {f for f, o in marked.items() if isinstance(o, Site) and adapter in o.lora_arithmetic}
