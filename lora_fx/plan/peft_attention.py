"""What PEFT does not do at `nn.MultiheadAttention`."""

from collections.abc import Iterable, Iterator

from lora_fx.plan.attention import SEPARATE
from lora_fx.plan.sites import SitePlan

_INITS = ("default", "gaussian", "random")


def beyond_peft(sites: Iterable[SitePlan]) -> Iterator[tuple[SitePlan, str, str]]:
    """Yield a site, the attribute that is at fault, and why PEFT would refuse or pass it by."""
    where = "`nn.MultiheadAttention`"
    for site in sites:
        if site.layer.kind != "attention":
            continue
        if site.parameter in SEPARATE:
            yield site, "target", f"PEFT adapts no {where} with a weight for each of q, k and v"
        if site.dropout:
            yield site, "dropout", f"PEFT has no dropout at {where}"
        if site.init.name not in _INITS:
            yield site, "init", f"PEFT has no init `{site.init.name}` at {where}"
        if site.variant.name != "lora":
            yield site, "variant", f"PEFT has no variant `{site.variant.name}` at {where}"
