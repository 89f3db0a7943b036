"""Layers of models with several stacks, and with layers inside layers."""

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, SwinConfig, SwinModel, Wav2Vec2Config, Wav2Vec2Model

import lora_fx
from lora_fx.diagnostics import LoraFxError
from lora_fx.plan.folding import fold
from tests.architectures import on_meta
from tests.plan.models import Pair

ENCODERS_AND_DECODERS = {
    "t5": ("encoder.block", "decoder.block", '"**.SelfAttention.q"'),
    "bart": ("model.encoder.layers", "model.decoder.layers", '"**.self_attn.q_proj"'),
    "whisper": ("model.encoder.layers", "model.decoder.layers", '"**.self_attn.q_proj"'),
    "llava": (
        "model.vision_tower.encoder.layers",
        "model.language_model.layers",
        '"**.self_attn.q_proj"',
    ),
}


def clip() -> nn.Module:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 44}
    text, vision = {"num_hidden_layers": 2}, {"num_hidden_layers": 3, "image_size": 16}
    return CLIPModel(
        CLIPConfig(text_config=sizes | text, vision_config=sizes | vision | {"patch_size": 8})
    )


def swin() -> nn.Module:
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 3], num_heads=[1, 2])
    return SwinModel(config)


def selected(model: nn.Module, target: str, *more: str) -> list[str]:
    text = f"lora 1 adapter x {{ rank = 1 target {target} }} {' '.join(more)}"
    return [str(one) for one in fold(site.fqn for site in lora_fx.plan(text, model).sites)]


def ranks(model: nn.Module, target: str, rank: str) -> dict[str, int]:
    text = f"lora 1 adapter x {{ target {target} {{ rank = {rank} }} }}"
    return {site.fqn: site.rank for site in lora_fx.plan(text, model).sites}


@pytest.mark.parametrize("name", ENCODERS_AND_DECODERS)
def test_layers_of_one_stack(name: str) -> None:
    model = on_meta(name)
    first, second, q = ENCODERS_AND_DECODERS[name]
    *_, last = selected(model, f'{q} in layers of "{second}"[1..]')
    assert last.startswith(f"{second}.{{1..2}}.")
    for stack in (first, second):
        (only,) = selected(model, f'{q} in layers of "{stack}"[0]')
        assert only.startswith(f"{stack}.0.")
        assert only.endswith(q.strip('"*'))


@pytest.mark.parametrize("name", ENCODERS_AND_DECODERS)
def test_without_a_name_it_is_ambiguous(name: str) -> None:
    first, second, q = ENCODERS_AND_DECODERS[name]
    with pytest.raises(LoraFxError) as raised:
        selected(on_meta(name), f"{q} in layers[0]")
    (fault,) = raised.value.diagnostics
    assert fault.code == "ambiguous-stack"
    assert fault.notes == (f"the stacks are `{first}`, `{second}`",)


@pytest.mark.parametrize("name", ENCODERS_AND_DECODERS)
def test_index_and_count_are_those_of_a_modules_own_stack(name: str) -> None:
    *_, q = ENCODERS_AND_DECODERS[name]
    found = ranks(on_meta(name), q, "layer.index + 1")
    assert sorted(found.values()) == [1, 1, 2, 2, 3, 3]
    assert all(f".{rank - 1}." in fqn for fqn, rank in found.items())


def test_a_count_for_each_stack() -> None:
    with torch.device("meta"):
        found = ranks(clip(), "q_proj", "layer.count")
    assert {(fqn.partition(".")[0], rank) for fqn, rank in found.items()} == {
        ("text_model", 2),
        ("vision_model", 3),
    }
    assert set(ranks(Pair(), "up", "layer.count").values()) == {2, 4}


@pytest.mark.parametrize(
    ("name", "layers"), [("vit", "vit.layers"), ("bert", "bert.encoder.layer")]
)
def test_one_stack_needs_no_name(name: str, layers: str) -> None:
    names = selected(on_meta(name), "linear in layers[2]")
    assert len(names) == 6
    assert all(one.startswith(f"{layers}.2.") for one in names)


def test_layers_inside_layers() -> None:
    with torch.device("meta"):
        model = swin()
    names = selected(model, 'linear in layers of "encoder.layers.1.blocks"[1..]')
    assert len(names) == 6
    assert all(name.startswith("encoder.layers.1.blocks.{1..2}.") for name in names)
    outer = 'linear in layers of "encoder.layers"[0]'
    assert {name[:17] for name in selected(model, outer)} == {"encoder.layers.0."}
    found = ranks(model, "linear", "4 * layer.count + layer.index")
    assert found["encoder.layers.0.downsample.reduction"] == 8
    assert max(rank for fqn, rank in found.items() if ".blocks." in fqn) == 14


def test_a_feature_extractor_is_a_stack_too() -> None:
    with torch.device("meta"):
        model = Wav2Vec2Model(
            Wav2Vec2Config(
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=44,
                conv_dim=(8, 8),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            )
        )
    assert selected(model, 'k_proj in layers of "encoder.layers"[1..]') == [
        "encoder.layers.{1..2}.attention.k_proj"
    ]


def test_no_layer_outside_the_stacks() -> None:
    with pytest.raises(LoraFxError) as raised:
        ranks(on_meta("bart"), "lm_head", "layer.index + 1")
    assert raised.value.diagnostics[0].code == "no-layer"


def test_a_stack_that_is_replicated_by_its_name() -> None:
    layers = 'layers { of = "decoder.blocks"  replicate 0..4, 2..4 }'
    plan = lora_fx.plan(f"lora 1 {layers} adapter x {{ rank = 1 target up }}", Pair())
    assert dict(plan.stacks) == {"encoder.blocks": 2, "decoder.blocks": 6}
    assert plan.layer_map is not None
    assert plan.layer_map.old == (0, 1, 2, 3, 2, 3)
    assert [str(one) for one in fold(site.fqn for site in plan.sites)] == [
        "encoder.blocks.{0..1}.up",
        "decoder.blocks.{0..5}.up",
    ]
