import pytest
from torch import nn
from transformers import LlamaForSequenceClassification

import lora_fx
from lora_fx.diagnostics import LoraFxError
from lora_fx.plan.modules import linear_modules, modules_of
from tests.plan.models import Experts, Pair, Shared, Tower
from tests.quantised import nf4
from tests.tiny import llama


def sites(body: str, model: nn.Module) -> list[str]:
    return [
        site.fqn for site in lora_fx.plan(f"lora 1\nadapter x {{ rank = 1 {body} }}", model).sites
    ]


def codes(body: str, model: nn.Module) -> list[str]:
    with pytest.raises(LoraFxError) as raised:
        sites(body, model)
    return [d.code for d in raised.value.diagnostics]


@pytest.mark.parametrize(
    ("body", "matched"),
    [
        ("target head", ["head"]),
        ("target up", ["blocks.0.up", "blocks.1.up", "blocks.2.up"]),
        ('target "up", head', None),
        ('target "head"', ["head"]),
        ('target "blocks.*.up"', ["blocks.0.up", "blocks.1.up", "blocks.2.up"]),
        ('target "blocks.{0,2}.*" where module.class == "Linear"', ["blocks.0.up", "blocks.0.down",
                                                                   "blocks.2.up", "blocks.2.down"]),
        ("target linear except blocks, up, down", ["branches.0", "branches.1", "head"]),
        ('target linear except "**.up", "branches.**", head', ["blocks.0.down", "blocks.1.down",
                                                             "blocks.2.down"]),
        ("target up in layers[1..]", ["blocks.1.up", "blocks.2.up"]),
        ("target up in layers[..1, 2]", ["blocks.0.up", "blocks.2.up"]),
        ('target up in layers of "blocks"[0]', ["blocks.0.up"]),
        ("target linear in layers[0]", ["blocks.0.up", "blocks.0.down"]),
        ("target up where layer.index == layer.count - 1", ["blocks.2.up"]),
        ('target linear where module.name == "head"', ["head"]),
        ("target linear where module.out_features == 5", ["blocks.0.down", "blocks.1.down",
                                                          "blocks.2.down"]),
        ("target linear where module.in_features > 2 where module.out_features > 10", ["head"]),
        ("target? nothing target head", ["head"]),
        ("target head, up in layers[1]", ["blocks.1.up"]),
        ("target head target up target head", ["blocks.0.up", "blocks.1.up", "blocks.2.up",
                                               "head"]),
    ],
)  # fmt: skip
def test_what_is_matched(body: str, matched: list[str] | None) -> None:
    if matched is None:
        assert codes(body, Tower()) == ["unmatched-target"]
    else:
        assert sites(body, Tower()) == matched


def test_a_name_matches_at_segments_only() -> None:
    assert codes("target ead", Tower()) == ["unmatched-target"]
    assert codes("target p", Tower()) == ["unmatched-target"]


def test_every_atom_is_judged_alone() -> None:
    assert codes("target head, nothing, neither", Tower()) == ["unmatched-target"] * 2
    assert codes("target linear except nothing", Tower()) == ["unmatched-target"]
    assert len(sites("target? linear except nothing", Tower())) == 9


def test_several_stacks_must_be_told_apart() -> None:
    assert codes("target up in layers[0]", Pair()) == ["ambiguous-stack"]
    assert codes('target up in layers of "blocks"[0]', Pair()) == ["ambiguous-stack"]
    assert sites('target up in layers of "decoder.blocks"[3..]', Pair()) == ["decoder.blocks.3.up"]
    assert codes("target first in layers[0]", Shared()) == ["ambiguous-stack"]
    assert sites("target up where layer.count == 2", Pair()) == [
        "encoder.blocks.0.up",
        "encoder.blocks.1.up",
    ]


def test_a_module_with_two_names_is_one_site() -> None:
    assert sites("target linear", Shared()) == ["first", "other"]
    assert sites("target second", Shared()) == ["first"]
    assert sites('target linear except "second"', Shared()) == ["other"]


def test_experts_count_in_the_layer_around_them() -> None:
    body = 'target "blocks.*.experts.*.up" where layer.index == 1'
    assert sites(body, Tower(2, Experts)) == [f"blocks.1.experts.{i}.up" for i in range(3)]


def test_linear_is_all_but_the_output_head() -> None:
    model = llama(2)
    assert len(linear_modules(model)) == 14
    assert "lm_head" not in linear_modules(model)
    classifier = LlamaForSequenceClassification(model.config)
    assert linear_modules(classifier) == linear_modules(model) | {"score"}


def test_linear_holds_quantised_layers() -> None:
    assert linear_modules(nf4(llama(2))) == linear_modules(llama(2))


def test_only_linear_layers_that_are_called() -> None:
    attention = nn.MultiheadAttention(6, 2)
    assert codes("target out_proj", nn.ModuleDict({"a": attention})) == ["unsupported-layer"]
    assert codes("target norm", Tower()) == ["unsupported-layer"]


def test_what_stands_inside_a_linear_layer_is_no_module_of_the_model() -> None:
    tower = Tower()
    tower.head.add_module("lora_A", nn.ModuleDict({"x": nn.Linear(5, 2)}))
    assert list(modules_of(tower).by_fqn) == list(modules_of(Tower()).by_fqn)
    assert linear_modules(tower) == linear_modules(Tower())
