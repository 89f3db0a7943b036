import torch
from torch import nn
from transformers import MistralForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

import lora_fx
from lora_fx.plan.replication import LayerMap, replicate_layers
from lora_fx.spec import parse
from tests.dense import relative
from tests.plan.models import Tower
from tests.quantised import nf4
from tests.tiny import SIZES, llama, tokens


def replicate(tree: nn.Module, ranges: str) -> LayerMap:
    spec = parse(f"lora 1 layers {{ replicate {ranges} }}")
    assert spec.layers is not None
    return replicate_layers(tree, spec.layers)


def test_the_new_stack() -> None:
    tree = Tower(4)
    old = list(tree.blocks)
    layer_map = replicate(tree, "..3, 1..3, 3..")
    assert layer_map == LayerMap("blocks", ((0, 3), (1, 3), (3, 4)), (0, 1, 2, 1, 2, 3))
    assert [tree.blocks[i] is old[j] for i, j in ((0, 0), (1, 1), (2, 2), (5, 3))] == [True] * 4
    assert [layer.layer_idx for layer in tree.blocks] == [0, 1, 2, 3, 4, 5]


def test_parameters_are_shared_and_buffers_are_not() -> None:
    tree = Tower(3)
    replicate(tree, "0..3, 1..3")
    first, copy = tree.blocks[1], tree.blocks[3]
    assert [a is b for a, b in zip(first.parameters(), copy.parameters(), strict=True)] == [
        True
    ] * 5
    assert first.up is not copy.up
    assert copy.scale is not first.scale
    assert torch.equal(copy.scale, first.scale)


def test_layers_can_be_left_out_and_reordered() -> None:
    tree = Tower(4)
    old = list(tree.blocks)
    assert replicate(tree, "3..4, 0..2").old == (3, 0, 1)
    assert [layer is old[i] for layer, i in zip(tree.blocks, (3, 0, 1), strict=True)] == [True] * 3


def test_configs_follow() -> None:
    config = SmolLM3Config(num_hidden_layers=4, num_key_value_heads=2, **SIZES)
    config.architectures = ["a", "b", "c", "d"]
    config.eos_token_id = [1, 2, 3, 4]
    tree = SmolLM3ForCausalLM(config)
    no_rope, types = list(config.no_rope_layers), list(config.layer_types)
    replicate(tree, "0..4, 2..4")
    assert tree.config.num_hidden_layers == 6
    assert tree.config.no_rope_layers == [*no_rope, *no_rope[2:]]
    assert tree.config.layer_types == [*types, *types[2:]]
    assert len(set(no_rope)) > 1
    assert tree.config.architectures == ["a", "b", "c", "d"]
    assert tree.config.eos_token_id == [1, 2, 3, 4]
    assert all(layer.self_attn.config is tree.config for layer in tree.model.layers)


def test_the_replicated_model_computes_and_generates() -> None:
    tree, plain = llama(3).eval(), llama(3).eval()
    replicate(tree, "0..2, 1..3")
    ids = tokens(2, 7)
    with torch.no_grad():
        cached = tree(ids[:, :5]).past_key_values
        assert len(cached.layers) == 4
        rest = tree(ids[:, 5:], past_key_values=cached).logits
        assert relative(rest, tree(ids).logits[:, 5:]) < 1e-5
        hidden = plain.model.embed_tokens(ids)
        position = plain.model.rotary_emb(hidden, torch.arange(7)[None])
        for i in (0, 1, 1, 2):
            hidden = plain.model.layers[i](hidden, position_embeddings=position)
        want = plain.lm_head(plain.model.norm(hidden))
        assert relative(tree(ids).logits, want) < 1e-5
        assert relative(plain(ids).logits, want) > 1e-2


def test_scales_of_packed_weights_are_shared() -> None:
    tree = nf4(llama(2))
    replicate(tree, "0..2, 0..2")
    first, copy = (tree.model.layers[i].mlp.up_proj for i in (0, 2))
    assert copy.weight is first.weight
    assert copy.weight.quant_state is first.weight.quant_state


def test_planning_leaves_the_model_alone() -> None:
    model = llama(3)
    before = {name: id(p) for name, p in model.named_parameters()}
    plan = lora_fx.plan("lora 1 layers { replicate 0..3, 0..3 } adapter x { target linear }", model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert (model.config.num_hidden_layers, model.model.layers[0].self_attn.layer_idx) == (3, 0)
    assert isinstance(model, nn.Module)
    assert not isinstance(model, MistralForCausalLM)
    assert len(plan.sites) == 6 * 7
    assert plan.base == sum(p.numel() for p in model.parameters())
