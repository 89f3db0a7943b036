"""The final values of one site, checked against the module."""

import math
from dataclasses import replace

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.applicable import inapplicable
from lora_fx.plan.kinds import Layer
from lora_fx.plan.names import Names
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.variants import frozen, tensors
from lora_fx.spec.expressions import Word
from lora_fx.spec.spec import Target


def settle(
    fqn: str,
    parameter: str | None,
    layer: Layer,
    adapter: str,
    rule: Target,
    names: Names,
    any_rank: bool = False,
) -> SitePlan:
    """Evaluate every attribute. Raises LoraFxError naming module and line.

    With `any_rank` the rank may be larger than the layer: that of a file is what it is.

    scaling = α/r (Hu et al. 2021, arXiv 2106.09685, §4.1), or α/√r for `rslora` (Kalajdzievski
    2023, arXiv 2312.03732, eq. 1), or the number given.
    """
    rank = int(names.number("rank"))
    if not any_rank:
        _check_rank(rank, layer, rule, names)
    alpha = float(names.number("alpha"))
    scaling = names.attribute("scaling")
    rslora = scaling == Word("rslora")
    factor = alpha / math.sqrt(rank) if rslora else alpha / rank
    site = SitePlan(
        fqn=fqn,
        parameter=parameter,
        layer=layer,
        adapter=adapter,
        rank=rank,
        alpha=alpha,
        scaling=factor if isinstance(scaling, Word) else float(names.number("scaling")),
        rslora=rslora,
        dropout=float(names.number("dropout")),
        init=names.word("init"),
        variant=names.word("variant"),
        lora_bias=names.attribute("lora_bias") is True,
        tie=names.attribute("tie") is True,
        offload=names.attribute("offload") is True,
        seed=int(names.number("seed")),
        dtype=names.word("dtype").name,
        compute=names.word("compute").name,
        trainable=_trainable(names),
        tensors={},
        frozen=frozenset(),
        rule=rule.span,
        settings=names.settings,
    )
    faults = inapplicable(site)
    if faults:
        raise LoraFxError(faults)
    return replace(site, tensors=tensors(site), frozen=frozen(site))


def _trainable(names: Names) -> bool:
    """Return whether a site is trained; of an adapter with weights only if the spec says so."""
    if "weights" in names.settings and "trainable" not in names.settings:
        return False
    return names.attribute("trainable") is True


def _check_rank(rank: int, layer: Layer, rule: Target, names: Names) -> None:
    if rank <= layer.largest_rank:
        return
    setting = names.settings.get("rank")
    span = setting.span if setting else rule.span
    message = f"rank {rank} is larger than the layer allows"
    shape = f"`{names.fqn}` has {layer.in_features} inputs and {layer.out_features} outputs"
    label = f"at most {layer.largest_rank}: {shape}"
    raise LoraFxError((Diagnostic("rank-too-large", message, span, label),))
