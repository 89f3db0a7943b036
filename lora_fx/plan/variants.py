"""The parameters that a variant adds to A and B, or shapes differently.

Names and shapes are those of PEFT's files. `velora` keeps a buffer, which is no parameter.
"""

from collections.abc import Iterable, Sequence

from lora_fx.plan.sites import SitePlan
from lora_fx.spec.expressions import Value, Word


def tensors(site: SitePlan) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters that a site has."""
    shapes = site.layer.shapes(site.rank)
    if site.lora_bias:
        shapes["lora_B.bias"] = (site.out_features,)
    match site.variant.name:
        case "dora":
            shapes["lora_magnitude_vector"] = magnitude_shape(site)
        case "kasa":
            shapes["lora_diag"] = (site.rank,)
        case "monteclora":
            samples = site.variant.argument("num_samples")
            assert isinstance(samples, int)
            shapes["lora_monteclora_sampler.std_prior"] = (site.rank,)
            shapes["lora_monteclora_sampler.expert_weights_prior"] = (samples,)
        case "bdlora":
            return shapes | _block_diagonal(site)
    return shapes


def magnitude_shape(site: SitePlan) -> tuple[int, ...]:
    """Return the shape of DoRA's magnitude: (out,), of a convolution (1, out, 1…)."""
    ones = (1,) * len(site.layer.kernel)
    return (1, site.out_features, *ones) if ones else (site.out_features,)


def frozen(site: SitePlan) -> frozenset[str]:
    """Return the parameters that are not trained: MiCA's B (PEFT's `mica`)."""
    if site.init.name != "mica":
        return frozenset()
    return frozenset(name for name in site.tensors or tensors(site) if "_B" in name)


def blocks_of(site: SitePlan) -> tuple[int, int]:
    """Return the numbers of blocks that A and B of a `bdlora` site have on their diagonals."""
    a, b, number = named_blocks(site)
    return number if a else 1, number if b else 1


def compression_of(site: SitePlan) -> tuple[int, float, str]:
    """Return the groups of a `velora` site, its scale and its `init_type`."""
    arguments = dict(site.variant.arguments)
    groups, scale, init = (arguments[n] for n in ("num_groups", "scale", "init_type"))
    assert isinstance(groups, int)
    assert isinstance(scale, int | float)
    assert isinstance(init, Word)
    return groups, float(scale), init.name


def drawn_of(site: SitePlan) -> tuple[int, float]:
    """Return how many samples a `monteclora` site draws, and the scale of their noise."""
    samples, scale = (site.variant.argument(name) for name in ("num_samples", "sample_scaler"))
    assert isinstance(samples, int)
    assert isinstance(scale, int | float)
    return samples, float(scale)


def invocation_of(sites: Iterable[SitePlan]) -> tuple[int, ...] | None:
    """Return the tokens that an adapter with these sites waits for; None if it does not."""
    for site in sites:
        if site.variant.name == "alora":
            tokens = site.variant.argument("tokens")
            assert isinstance(tokens, tuple)
            return tokens  # type: ignore[return-value]
    return None


def named_blocks(site: SitePlan) -> tuple[bool, bool, int]:
    """Return whether a `bdlora` site is named in `a` and in `b`, and the number of blocks."""
    arguments = dict(site.variant.arguments)
    number = arguments["blocks"]
    assert isinstance(number, int)
    return _named(site, arguments.get("a")), _named(site, arguments.get("b")), number


def _block_diagonal(site: SitePlan) -> dict[str, tuple[int, ...]]:
    a, b, blocks = named_blocks(site)
    if a:
        return {"lora_A.weight": (site.rank, site.in_features // blocks)}
    return {"lora_B.weight": (site.out_features, site.rank // blocks)} if b else {}


def _named(site: SitePlan, patterns: Value | None) -> bool:
    if not isinstance(patterns, Sequence):
        return False
    return any(isinstance(part, str) and part in site.name for part in patterns)
