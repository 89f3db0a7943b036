import math

import pytest

import lora_fx
from lora_fx.diagnostics import LoraFxError
from lora_fx.plan.kinds import Layer
from lora_fx.plan.plan import Plan
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.expressions import Word
from tests.plan.models import Tower
from tests.tiny import llama


def plan(body: str) -> Plan:
    return lora_fx.plan(f"lora 1\nadapter x {{ {body} }}", Tower())


def site(body: str, fqn: str = "head") -> SitePlan:
    return next(site for site in plan(body).sites if site.fqn == fqn)


def test_where_nothing_is_set() -> None:
    found = site("rank = 1 target head")
    values = {k: v for k, v in vars(found).items() if k not in ("rule", "settings")}
    assert values == {
        "fqn": "head",
        "parameter": None,
        "layer": Layer("linear", 5, 11),
        "adapter": "x",
        "rank": 1,
        "alpha": 8.0,
        "scaling": 8.0,
        "rslora": False,
        "dropout": 0.0,
        "init": Word("default"),
        "variant": Word("lora"),
        "lora_bias": False,
        "tie": False,
        "offload": False,
        "seed": 0,
        "dtype": "float32",
        "compute": "activation",
        "trainable": True,
        "tensors": {"lora_A.weight": (1, 5), "lora_B.weight": (11, 1)},
        "frozen": frozenset(),
    }


def test_everything_set() -> None:
    found = site(
        "rank = 3 alpha = 5 scaling = rslora dropout = 10% init = gaussian seed = 9 "
        "dtype = bfloat16 compute = float32 trainable = false target head"
    )
    assert found.scaling == pytest.approx(5 / math.sqrt(3))
    assert (found.rslora, found.dropout, found.init, found.seed) == (True, 0.1, Word("gaussian"), 9)
    assert (found.dtype, found.compute, found.trainable) == ("bfloat16", "float32", False)
    assert found.parameters == 3 * (5 + 11)


def test_scaling_as_a_number() -> None:
    found = site("rank = 3 alpha = 5 scaling = 2 target head")
    assert (found.alpha, found.scaling, found.rslora) == (5.0, 2.0, False)
    assert type(found.scaling) is float


def test_the_last_rule_that_matches_wins_attribute_by_attribute() -> None:
    body = """rank = 1
      target linear { rank = 2  alpha = 20 }
      target "blocks.1.*" where module.class == "Linear" { alpha = 30 }
      target up { rank = 4 }"""
    found = {s.fqn: (s.rank, s.alpha) for s in plan(body).sites}
    assert found["head"] == (2, 20)
    assert found["blocks.0.up"] == (4, 20)
    assert found["blocks.1.up"] == (4, 30)
    assert found["blocks.1.down"] == (2, 30)


def test_where_each_value_comes_from() -> None:
    found = site("rank = 1\ntarget linear { alpha = 3 }\ntarget head { seed = 4 }")
    assert {name: span.line for name, span in found.provenance.items()} == {
        "rank": 2,
        "alpha": 3,
        "seed": 4,
    }
    assert found.rule.line == 4


def test_expressions_use_the_values_that_won() -> None:
    body = "rank = 1 alpha = 2 * rank target linear target head { rank = 3 }"
    assert site(body).alpha == 6
    assert site(body, "blocks.0.up").alpha == 2
    assert site("alpha = rank * 10 target head { rank = alpha / 5  alpha = 15 }").rank == 3


def test_expressions_see_layer_and_module() -> None:
    body = """rank = if layer.index < 1 then 2 else layer.count
      alpha = module.in_features * 100 + module.out_features
      seed = if module.name == "blocks.1.down" then 1 else 0
      target up, down"""
    found = {s.fqn: (s.rank, s.alpha, s.seed) for s in plan(body).sites}
    assert found["blocks.0.up"] == (2, 507, 0)
    assert found["blocks.1.down"] == (3, 705, 1)


def test_expressions_see_the_config() -> None:
    body = "lora 1 adapter x { rank = model.config.hidden_size / 8 target q_proj }"
    assert lora_fx.plan(body, llama(1)).sites[0].rank == 4
    nested = body.replace(
        "model.config.hidden_size / 8", "round(model.config.rope_parameters.rope_theta / 2500)"
    )
    assert lora_fx.plan(nested, llama(1)).sites[0].rank == 4


def test_adapters_are_apart_and_stand_in_file_order() -> None:
    text = "lora 1 adapter b { rank = 2 target head, up } adapter a { rank = 3 target head }"
    found = [(s.fqn, s.adapter, s.rank) for s in lora_fx.plan(text, Tower(1)).sites]
    assert found == [("blocks.0.up", "b", 2), ("head", "b", 2), ("head", "a", 3)]


@pytest.mark.parametrize(
    ("body", "codes"),
    [
        ("rank = 6 target head", ["rank-too-large"]),
        ("rank = 5 target head", []),
        ("target up { rank = 2 } target down { rank = alpha  alpha = rank }", ["cyclic-value"]),
        ("rank = sqrt(layer.index) target up", ["wrong-value"]),
        ("dropout = layer.index target up", ["wrong-value"]),
        ("alpha = 1 / layer.index target up", ["division-by-zero"]),
        ("target linear { rank = layer.count }", ["no-layer"]),
        ("rank = model.config.x target head", ["no-config"]),
    ],
)
def test_what_is_checked_at_each_site(body: str, codes: list[str]) -> None:
    try:
        plan(f"rank = 1 {body}" if body.startswith(("target", "alpha", "drop")) else body)
        found = []
    except LoraFxError as error:
        found = [d.code for d in error.diagnostics]
    assert found == codes


def test_a_rule_that_is_overridden_everywhere_is_a_warning() -> None:
    body = "target head { rank = 1 } target linear { rank = 2 } target up { rank = 3 alpha = 4 }"
    (warning,) = plan(body).notes
    assert (warning.code, warning.severity) == ("overridden-rule", "warning")
    assert warning.span is not None
    assert warning.span.text == "target head"


def test_everything_that_is_wrong_is_told_at_once() -> None:
    text = """lora 1
adapter a { rank = 1 target nothing target norm }
adapter b { target head { rank = 99 } target linear in layers[9] }"""
    with pytest.raises(LoraFxError) as raised:
        lora_fx.plan(text, Tower())
    assert [d.code for d in raised.value.diagnostics] == [
        "unmatched-target",
        "unsupported-layer",
        "layer-range",
        "rank-too-large",
    ]
