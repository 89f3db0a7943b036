"""Which attributes can be combined, with each other and with a kind of layer."""

from collections.abc import Iterator

from lora_fx.diagnostics import Diagnostic, Span
from lora_fx.plan.kinds import Kind
from lora_fx.plan.sites import CHANGES_BASE, SitePlan
from lora_fx.plan.variants import named_blocks
from lora_fx.spec.attributes import INITS, VARIANTS

_PLAIN_INITS = frozenset({"default", "gaussian", "random"})
_OF_MATRIX = frozenset({"orthogonal", "pissa", "olora"})
_LINEAR: tuple[Kind, ...] = ("linear", "transposed")
_INITS: dict[Kind, frozenset[str]] = {
    **dict.fromkeys(_LINEAR, frozenset(INITS)),
    "embedding": _PLAIN_INITS | {"mica"},
    "conv": _PLAIN_INITS | _OF_MATRIX,
    "attention": _PLAIN_INITS | _OF_MATRIX,
    "parameter": _PLAIN_INITS,
}
_VARIANTS: dict[Kind, frozenset[str]] = {
    "linear": frozenset(VARIANTS),
    "transposed": frozenset(VARIANTS) - {"kasa"},
    "embedding": frozenset({"lora", "dora"}),
    "conv": frozenset({"lora", "dora"}),
    "attention": frozenset({"lora", "dora"}),
    "parameter": frozenset({"lora"}),
}
_ON_A_CHANGED_BASE = frozenset({"lora", "dora", "velora"})
_NO_DROPOUT: tuple[Kind, ...] = ("embedding", "parameter")
_NO_BIAS: tuple[Kind, ...] = ("embedding", "attention", "parameter")
_WHAT: dict[Kind, str] = {
    "linear": "a linear layer",
    "transposed": "a linear layer",
    "embedding": "an embedding",
    "conv": "a convolution",
    "attention": "`nn.MultiheadAttention`",
    "parameter": "a parameter",
}


def inapplicable(site: SitePlan) -> list[Diagnostic]:
    """Return a fault for each attribute that cannot apply at a site, at the line that set it."""
    found = list(_of_kind(site)) or [*_combined(site), *_of_rank(site)]
    return [
        Diagnostic("cannot-apply", message, _span(site, name), f"{reason} at `{site.name}`")
        for name, message, reason in found
    ]


def _span(site: SitePlan, attribute: str) -> Span:
    setting = site.settings.get(attribute)
    return setting.span if setting else site.rule


def _of_kind(site: SitePlan) -> Iterator[tuple[str, str, str]]:
    kind, what = site.layer.kind, _WHAT[site.layer.kind]
    if site.init.name not in _INITS[kind]:
        yield "init", f"{what} has no init `{site.init.name}`", "adapted"
    if site.variant.name not in _VARIANTS[kind]:
        yield "variant", f"{what} has no variant `{site.variant.name}`", "adapted"
    if site.dropout and kind in _NO_DROPOUT:
        yield "dropout", f"{what} has no dropout; write `dropout = 0` for it", "adapted"
    if site.lora_bias and kind in _NO_BIAS:
        yield "lora_bias", f"{what} has no `lora_bias`", "adapted"


def _combined(site: SitePlan) -> Iterator[tuple[str, str, str]]:
    variant, init = site.variant.name, site.init.name
    if variant == "dora" and site.layer.groups > 1:
        message = "a convolution with groups has no variant `dora`"
        yield "variant", message, f"{site.layer.groups} groups"
    if init not in _PLAIN_INITS and site.layer.groups > 1:
        message = f"a convolution with groups has no init `{init}`"
        yield "init", message, f"{site.layer.groups} groups"
    if site.lora_bias and variant not in ("lora", "alora"):
        yield "lora_bias", f"`lora_bias` and variant `{variant}` do not go together", "both set"
    if variant == "dora" and site.tie and site.layer.kind == "embedding":
        message = "variant `dora` and `tie` do not go together at an embedding"
        yield "variant", message, "both set"
    if variant == "bdlora" and init not in _PLAIN_INITS:
        yield "init", f"init `{init}` and variant `bdlora` do not go together", "both set"
    if init == "mica" and variant != "lora":
        yield "init", f"init `mica` and variant `{variant}` do not go together", "both set"
    if init in CHANGES_BASE and variant not in _ON_A_CHANGED_BASE:
        yield "init", f"init `{init}` and variant `{variant}` do not go together", "both set"
    if init in ("mica", "loftq") and site.lora_bias:
        yield "init", f"init `{init}` and `lora_bias` do not go together", "both set"


def _of_rank(site: SitePlan) -> Iterator[tuple[str, str, str]]:
    rank, layer = site.rank, site.layer
    if site.init.name == "orthogonal" and rank % 2:
        yield "rank", "init `orthogonal` needs an even rank", f"is {rank}"
    if site.init.name == "lora_ga" and 2 * rank > layer.largest_rank:
        message = "init `lora_ga` needs twice the rank in directions"
        yield "rank", message, f"is {rank}, and {layer.largest_rank} are there,"
    if rank % layer.groups:
        message = f"the rank must be a multiple of the {layer.groups} groups"
        yield "rank", message, f"is {rank}"
    if site.init.name in CHANGES_BASE and site.scaling <= 0:
        message = f"init `{site.init.name}` needs a scaling above 0"
        yield (
            ("scaling" if "scaling" in site.settings else "alpha"),
            message,
            f"is {site.scaling:g}",
        )
    if site.variant.name == "kasa" and rank >= layer.largest_rank:
        message = "variant `kasa` needs a rank below the smaller side of the layer"
        yield "rank", message, f"is {rank}, of {layer.largest_rank},"
    if site.variant.name == "bdlora":
        yield from _of_blocks(site)


def _of_blocks(site: SitePlan) -> Iterator[tuple[str, str, str]]:
    a, b, blocks = named_blocks(site)
    if a and b:
        yield "variant", "`bdlora` makes A or B block diagonal, not both", "both named"
    if not a and not b and site.variant.argument("strict"):
        yield "variant", "`bdlora(strict = true)` names every module in `a` or `b`", "not named"
    sides = [site.rank, site.in_features if a else site.out_features]
    if (a or b) and any(side % blocks for side in sides):
        message = f"rank and features must be multiples of the {blocks} blocks"
        yield "variant", message, f"are {sides[0]} and {sides[1]}"
