"""A module can get several mixins, in any order: no name of one is in another's way."""

from itertools import combinations

import pytest

from lora_fx.adapters.sites.convolution_site import ConvolutionSite
from lora_fx.adapters.sites.routed_rows import RowsFollowed
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.token_rows import TokenRows
from lora_fx.adapters.weights.own_outputs import OwnOutputs
from lora_fx.runtime.units.unit import Compiled

MIXINS = (Site, OwnOutputs, TokenRows, RowsFollowed, Compiled)
SHARED = {"forward", "lora_routing"}  # each calls the next one's; one object for all


def names(mixin: type) -> set[str]:
    return {name for name in vars(mixin) if not name.startswith("__")} - SHARED


@pytest.mark.parametrize(("one", "other"), list(combinations(MIXINS, 2)))
def test_names_are_apart(one: type, other: type) -> None:
    assert not names(one) & names(other)


def test_what_overrides_is_found() -> None:
    assert "_announced" in names(Site)
    assert names(ConvolutionSite) - {"_conv_forward"} == set()
