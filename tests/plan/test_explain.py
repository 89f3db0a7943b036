"""Which line set what at a module, what lost, and why another is left as it is."""

import pytest

import lora_fx
from lora_fx.diagnostics import LoraFxError
from lora_fx.plan.explain import Part
from tests.tiny import llama

SPEC = """lora 1
preset small { rank = 2  alpha = 3 }
adapter default {
  use small
  bias = lora_only
  target q_proj, o_proj { rank = 4 }
  target linear except down_proj in layers[1..] where module.out_features < 100 { rank = 6 }
  target o_proj in layers[2] { alpha = 2 * rank }
  train "model.layers.3.mlp"
  tokens [7, 8]
}
adapter other { rank = 1  target k_proj }
"""


@pytest.fixture(scope="module")
def plan() -> lora_fx.plan.Plan:
    return lora_fx.plan(SPEC, llama(4, attention_bias=True))


def part(plan: lora_fx.plan.Plan, name: str, adapter: str = "default") -> Part:
    return next(p for p in plan.explain(f"model.{name}") if p.adapter == adapter)


def rows(found: Part) -> dict[str, tuple[str, int | None, list[str]]]:
    """Each attribute's value, the line that set it, and the rules that lost."""
    ((_, attributes),) = found.sites
    return {
        a.name: (a.value, a.setting and a.setting.span.line, [lost.origin for lost in a.lost])
        for a in attributes
    }


def test_every_attribute_says_where_it_comes_from(plan: lora_fx.plan.Plan) -> None:
    found = rows(part(plan, "layers.2.self_attn.o_proj"))
    narrow = "target linear except down_proj in layers[1..] where module.out_features < 100"
    assert found["rank"] == ("6", 7, ["target q_proj, o_proj", "preset small"])
    assert found["alpha"] == ("12", 8, ["preset small"])
    assert found["scaling"] == ("2", None, [])
    assert found["init"] == ("default", None, [])
    ((site, attributes),) = part(plan, "layers.2.self_attn.o_proj").sites
    assert {a.name: a.setting.origin for a in attributes if a.setting}["rank"] == narrow
    assert (site.rank, site.alpha) == (6, 12)
    assert rows(part(plan, "layers.0.self_attn.o_proj"))["rank"] == ("4", 6, ["preset small"])


def test_what_statements_make_of_a_module(plan: lora_fx.plan.Plan) -> None:
    def verdicts(name: str) -> list[str]:
        return [
            "selects" if v.selects else v.left_out.text if v.left_out else "-"
            for v in part(plan, name).verdicts
        ]

    assert verdicts("layers.2.self_attn.o_proj") == ["selects", "selects", "selects", "-"]
    assert verdicts("layers.0.self_attn.v_proj") == ["-", "in layers[1..]", "-", "-"]
    assert verdicts("layers.1.mlp.down_proj") == ["-", "down_proj", "-", "-"]
    assert verdicts("layers.3.mlp.up_proj") == ["-", 'train "model.layers.3.mlp"', "-", "-"]


def test_what_is_trained_of_the_base(plan: lora_fx.plan.Plan) -> None:
    assert part(plan, "layers.3.mlp.up_proj").trained == "model.layers.3.mlp"
    assert part(plan, "embed_tokens").tokens == (7, 8)
    assert part(plan, "layers.0.self_attn.q_proj").biases == (
        "model.layers.0.self_attn.q_proj.bias",
    )
    assert part(plan, "norm").does_nothing
    assert part(plan, "layers.0.self_attn.q_proj", "other").does_nothing
    assert not part(plan, "layers.0.self_attn.k_proj", "other").does_nothing


def test_parameters_are_found_by_their_name_and_by_their_module() -> None:
    spec = 'lora 1 adapter a { rank = 3 target parameter "**.q_proj.weight" }'
    plan = lora_fx.plan(spec, llama(2))
    for name in ("layers.1.self_attn.q_proj.weight", "layers.1.self_attn.q_proj"):
        assert rows(part(plan, name, "a"))["rank"] == ("3", 1, [])


def test_parameters_that_nothing_adapts(plan: lora_fx.plan.Plan) -> None:
    assert part(plan, "layers.0.self_attn.q_proj.weight").does_nothing
    bias = "layers.0.self_attn.q_proj.bias"
    assert part(plan, bias).biases == (f"model.{bias}",)
    spec = 'lora 1 adapter a { target? parameter "**.q_proj.weight" except q_proj target k_proj }'
    (verdict, _) = part(
        lora_fx.plan(spec, llama(2)), "layers.1.self_attn.q_proj.weight", "a"
    ).verdicts
    assert not verdict.selects
    assert verdict.left_out is not None
    assert verdict.left_out.text == "q_proj"


def test_an_unknown_module_is_named_with_the_closest(plan: lora_fx.plan.Plan) -> None:
    with pytest.raises(LoraFxError) as raised:
        plan.explain("model.layers.1.mlp.upproj")
    (diagnostic,) = raised.value.diagnostics
    assert diagnostic.code == "no-such-module"
    assert diagnostic.help == "did you mean `model.layers.1.mlp.up_proj`?"
