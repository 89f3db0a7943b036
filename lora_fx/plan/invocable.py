"""Refuse adapters that wait for tokens of their own where nobody can tell which these are."""

import inspect
from collections.abc import Iterable, Iterator

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.alike import once_each
from lora_fx.plan.folding import numberless
from lora_fx.plan.plan import Plan
from lora_fx.plan.sample_rows import SAMPLES, TOKENS, shapes_of
from lora_fx.plan.sites import SitePlan

_IDS = "input_ids"


def require_invocable(model: nn.Module, plan: Plan, sites: Iterable[SitePlan]) -> None:
    """Raise LoraFxError for an `alora` at these sites that cannot be invoked by tokens.

    The model has to take `input_ids` and no others beside them, and an adapted module to get
    (samples, tokens, features), as far as that can be known without weights.
    """
    waiting = [site for site in sites if site.variant.name == "alora"]
    if not waiting:
        return
    faults = list(_of_model(model, waiting[0])) or list(_of_rows(plan, waiting))
    if faults:
        raise LoraFxError(once_each(faults))


def _of_model(model: nn.Module, site: SitePlan) -> Iterator[Diagnostic]:
    name = type(model).__name__
    if _IDS not in inspect.signature(model.forward).parameters:
        yield _fault(site, f"`{name}` takes no `{_IDS}`, in which `alora` looks for its tokens")
    elif getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        message = (
            f"`{name}` has tokens of an encoder and of a decoder, and `alora` is for a decoder"
        )
        yield _fault(site, message)


def _of_rows(plan: Plan, sites: list[SitePlan]) -> Iterator[Diagnostic]:
    there = {site.fqn: site for site in sites}
    shapes, is_all = shapes_of(plan, there)
    for fqn in there if is_all else ():
        if fqn not in shapes:
            yield _fault(there[fqn], f"`{numberless(fqn)}` gets nothing of a sample's tokens")
    for fqn, shape in shapes.items():
        if len(shape) != 3 or shape[:2] != (SAMPLES, TOKENS):
            message = f"`{numberless(fqn)}` gets rows that are not the tokens of samples"
            note = f"of {SAMPLES} samples of {TOKENS} tokens it gets {tuple(shape)}"
            yield _fault(there[fqn], message, note)


def _fault(site: SitePlan, message: str, *notes: str) -> Diagnostic:
    setting = site.settings.get("variant")
    span = setting.span if setting else site.rule
    return Diagnostic("not-invocable", message, span, "acts from its tokens on", notes=notes)
