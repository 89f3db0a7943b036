"""The final values of one site, checked against the module."""

import math

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.names import Names
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.expressions import Value, Word
from lora_fx.spec.spec import Target


def settle(fqn: str, module: nn.Linear, adapter: str, rule: Target, names: Names) -> SitePlan:
    """Evaluate every attribute. Raises LoraFxError naming module and line.

    scaling = α/r (Hu et al. 2021, arXiv 2106.09685, §4.1), or α/√r for `rslora` (Kalajdzievski
    2023, arXiv 2312.03732, eq. 1), or the number given.
    """
    rank = int(_number(names.attribute("rank")))
    _check_rank(rank, fqn, module, rule, names)
    alpha = float(_number(names.attribute("alpha")))
    scaling = names.attribute("scaling")
    rslora = scaling == Word("rslora")
    factor = alpha / math.sqrt(rank) if rslora else alpha / rank
    return SitePlan(
        fqn=fqn,
        adapter=adapter,
        in_features=module.in_features,
        out_features=module.out_features,
        rank=rank,
        alpha=alpha,
        scaling=factor if isinstance(scaling, Word) else float(_number(scaling)),
        rslora=rslora,
        dropout=float(_number(names.attribute("dropout"))),
        init=_word(names.attribute("init")),
        seed=int(_number(names.attribute("seed"))),
        dtype=_word(names.attribute("dtype")),
        compute=_word(names.attribute("compute")),
        trainable=names.attribute("trainable") is True,
        rule=rule.span,
        provenance={name: setting.span for name, setting in names.settings.items()},
    )


def _check_rank(rank: int, fqn: str, module: nn.Linear, rule: Target, names: Names) -> None:
    largest = min(module.in_features, module.out_features)
    if rank <= largest:
        return
    setting = names.settings.get("rank")
    span = setting.span if setting else rule.span
    message = f"rank {rank} is larger than the layer allows"
    shape = f"`{fqn}` has {module.in_features} inputs and {module.out_features} outputs"
    label = f"at most {largest}: {shape}"
    raise LoraFxError((Diagnostic("rank-too-large", message, span, label),))


def _number(value: Value) -> int | float:
    assert isinstance(value, int | float)
    return value


def _word(value: Value) -> str:
    assert isinstance(value, Word)
    return value.name
