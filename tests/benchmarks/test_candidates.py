"""What is timed side by side is the same work."""

import pytest
import torch
from torch import nn

from tests.benchmarks import decoders as d
from tests.benchmarks.adapted import Adapter, by_lora_fx, by_peft, trainable, training_step
from tests.benchmarks.command import chosen
from tests.benchmarks.fused_functions import Fused, checked

RANK = 3


@pytest.fixture(scope="module")
def base():
    return d.frozen_base("tiny", 2)


@pytest.mark.parametrize("targets", [d.ATTENTION, d.ATTENTION + d.MLP])
def test_candidates_train_alike_on_one_set_of_weights(base, targets: tuple[str, ...]) -> None:
    weights = {p.data_ptr() for p in base.parameters()}
    sizes = {}
    for name, build in d.decoders(base, Adapter(RANK, 0.1, targets)).items():
        model = build()
        sizes[name] = sum(p.numel() for p in trainable(model))
        dtype = torch.bfloat16 if "bf16" in name else torch.float32
        assert {p.dtype for p in trainable(model)} <= {dtype}, name
        held = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
        assert held == weights or name == d.OURS_AUGMENTED, name
        assert all(p.any() for p in trainable(model)), name
    assert {name for name in sizes if not sizes[name]} == {d.FLOOR, d.FLOOR_WHOLE}
    hidden, inner, narrow = 128, 352, 64
    attention = 2 * (hidden + hidden) + 2 * (hidden + narrow)
    width = attention + (3 * (hidden + inner) if "up_proj" in targets else 0)
    assert set(sizes.values()) == {0, 2 * RANK * width}


def test_dropout_adds_a_candidate_without_it(base) -> None:
    wet = d.decoders(base, Adapter(RANK, 0.1, d.ATTENTION))
    assert set(wet) - set(d.decoders(base, Adapter(RANK, 0.0, d.ATTENTION))) == {d.OURS_DRY}
    rates = {m.p for m in wet[d.PEFT_EAGER]().modules() if isinstance(m, nn.Dropout)}
    assert 0.1 in rates


def test_dora_is_dora_everywhere_but_in_what_it_is_compared_with(base) -> None:
    builds = d.decoders(base, Adapter(RANK, 0.0, d.MLP, "dora"))
    assert set(builds) - set(d.decoders(base, Adapter(RANK, 0.0, d.MLP))) == {
        d.OURS_LORA,
        d.OURS_LORA_AUGMENTED,
    }
    for name in (d.OURS, d.OURS_WHOLE, d.OURS_LORA, d.PEFT_EAGER, d.PEFT_EAGER_FP32):
        names = {n for n, p in builds[name]().named_parameters() if p.requires_grad}
        assert any("magnitude" in n for n in names) == (name != d.OURS_LORA), name


def test_a_step_computes_all_gradients_and_drops_them(base) -> None:
    seen = []
    model = by_peft(base, Adapter(RANK, 0.0, d.MLP), upcast=False)
    x = torch.randn(2, 5, 128, dtype=torch.bfloat16, requires_grad=True)
    for leaf in (x, *trainable(model)):
        leaf.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.norm().item()))

    def forward():
        return [model(inputs_embeds=x).last_hidden_state]

    step = training_step(forward, [torch.ones_like(x)], [x, *trainable(model)])
    step()
    assert len(seen) == 1 + 2 * 2 * 3
    assert all(norm > 0 for norm in seen)
    assert all(leaf.grad is None for leaf in (x, *model.parameters()))


def test_only_what_computes_the_same_is_timed() -> None:
    base = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    model = by_peft(base, Adapter(2, 0.3, ("0",)), upcast=True)
    x = torch.randn(5, 6, requires_grad=True)
    same = Fused(lambda module, x: module[0](x), model)
    assert checked(same, x) is same
    assert 0.3 in {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    for other in (
        lambda m, x: m[0](x) + 0.01,
        lambda m, x: m[0](x) + 0.01 * (x - x.detach())[:, :4],
    ):
        with pytest.raises(ValueError, match="differs from PEFT"):
            checked(Fused(other, model), x)


def test_lora_fx_and_peft_have_one_scaling(base) -> None:
    adapter = Adapter(RANK, 0.0, d.MLP)
    ours, peft = by_lora_fx(base, adapter, "layers"), by_peft(base, adapter, upcast=True)
    scaling = ours.get_submodule("layers.0.mlp.up_proj").lora_scalings
    assert set(scaling.tolist()) == {2.0}
    layer = peft.get_submodule("base_model.model.layers.0.mlp.up_proj")
    assert layer.scaling == {"default": 2.0}


def test_words_choose_candidates() -> None:
    names = [d.FLOOR, d.OURS, d.PEFT_EAGER, d.PEFT_WHOLE]
    always = (d.FLOOR, d.OURS)
    assert chosen(names, [], always) == names
    assert chosen(names, ["eager"], always) == [d.FLOOR, d.OURS, d.PEFT_EAGER]
    with pytest.raises(SystemExit, match=r"`egaer`.*\n.*frozen base"):
        chosen(names, ["PEFT", "egaer"], always)
