"""On each architecture: what a config plans to is what PEFT makes of it."""

import pytest

from tests.architectures import ARCHITECTURES, on_meta
from tests.plan.peft.configs import configs
from tests.plan.peft.made import by_import, by_peft


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same(architecture: str) -> None:
    made = {}
    for name, config in configs(on_meta(architecture)):
        made[name] = by_peft(ARCHITECTURES[architecture](), config)
        assert by_import(config, on_meta(architecture)) == made[name], f"{name}: {config}"
    assert len({frozenset(one.sites.items()) for one in made.values()}) > 8
