import torch
from torch import nn
from transformers import SwinConfig, SwinModel

from lora_fx.plan.stacks import every_stack, find_stacks, place_of
from tests.plan.models import Experts, Pair, Shared, Tower
from tests.tiny import llama


def fqns(tree: nn.Module) -> list[str]:
    return [stack.fqn for stack in find_stacks(tree)]


def test_transformers_layers() -> None:
    (stack,) = find_stacks(llama(3))
    assert stack.fqn == "model.layers"
    assert len(stack.layers) == 3


def test_one_layer_is_a_stack_if_it_is_marked_as_a_layer() -> None:
    assert fqns(llama(1)) == ["model.layers"]
    assert fqns(Tower(1)) == []


def test_blocks_of_one_class() -> None:
    assert fqns(Tower(3)) == ["blocks"]
    assert fqns(Pair()) == ["encoder.blocks", "decoder.blocks"]


def test_lists_of_experts_or_of_leaves_are_none() -> None:
    assert fqns(Tower(2, Experts)) == ["blocks"]
    assert fqns(Shared()) == []


def test_layers_inside_layers() -> None:
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 2], num_heads=[1, 2])
    with torch.device("meta"):
        model = SwinModel(config)
    assert fqns(model) == ["encoder.layers"]
    stacks = every_stack(model)
    assert [stack.fqn for stack in stacks] == [
        "encoder.layers",
        "encoder.layers.0.blocks",
        "encoder.layers.1.blocks",
    ]
    inner = place_of("encoder.layers.1.blocks.1.attention", stacks)
    assert inner is not None
    assert (inner.stack.fqn, inner.index) == ("encoder.layers.1.blocks", 1)
    outer = place_of("encoder.layers.1.downsample", stacks)
    assert outer is not None
    assert (outer.stack.fqn, outer.index) == ("encoder.layers", 1)


def test_outside_every_stack() -> None:
    assert place_of("lm_head", find_stacks(llama(2))) is None
