"""A weight that is read without its module being called makes an adapter that does nothing."""

import copy

import pytest
import torch
from torch import nn

import lora_fx
from tests.dense import relative
from tests.odd_models import Layered, Reading, Sometimes
from tests.tiny import llama, tokens


def compiled(base: nn.Module, targets: str, backend: str | None, unit: str = "layers") -> nn.Module:
    text = f"""lora 1
    adapter default {{ rank = 2 init = random target {targets} }}
    compile {{ unit = {unit} }}"""
    return lora_fx.compile(base, text, backend=backend)


def refusal(model: nn.Module, *args: torch.Tensor) -> list[tuple[str, str]]:
    """The message and the model's line of each fault."""
    with pytest.raises(lora_fx.LoraFxError) as caught:
        model(*args)
    assert {d.code for d in caught.value.diagnostics} == {"site-never-called"}
    return [(d.message.split("`")[1], d.span.text) for d in caught.value.diagnostics]


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_module_that_is_never_called(backend: str | None) -> None:
    model = compiled(Reading(), "up, proj, gate", backend)
    for _ in range(2):
        assert refusal(model, torch.randn(4, 5)) == [
            ("proj", "return F.linear(y, self.proj.weight)")
        ]
    assert compiled(Reading(), "up, gate", backend)(torch.randn(4, 5)).shape == (4, 5)


def test_inside_layers_and_outside_them() -> None:
    base = Layered([Reading() for _ in range(3)])
    outside = ("head", "return torch.cat([x, x]) @ self.head.weight.T")
    inside = [(f"layers.{i}.proj", "return F.linear(y, self.proj.weight)") for i in range(3)]
    x = torch.randn(4, 5)
    assert refusal(compiled(base, "up, head", "eager"), x) == [outside]
    assert refusal(compiled(base, "up, proj", "eager"), x) == inside[:1]
    assert refusal(compiled(base, "up, proj, head", None), x) == [*inside, outside]
    whole = compiled(base, "up, proj, head", "eager", unit="model")
    assert sorted(refusal(whole, x)) == sorted([*inside, outside])


@pytest.mark.parametrize("backend", [None, "eager"])
def test_what_is_not_read_may_stay_uncalled(backend: str | None) -> None:
    model = compiled(Sometimes(), "up, side", backend)
    x = torch.randn(4, 5)
    assert relative(model(x), model(x, side=True)) > 1e-2


def test_a_weight_that_a_called_module_shares() -> None:
    base = llama(2, tie_word_embeddings=True)
    for targets in ("embed_tokens", "lm_head"):
        for backend in (None, "eager"):
            assert compiled(base, targets, backend)(tokens()).logits.shape[-1] == 101
    replicated = "layers { replicate 0..2, 0..2 } adapter default { rank = 2 target linear }"
    lora_fx.compile(llama(2), f"lora 1 {replicated}", backend="eager")(tokens())


def test_it_is_looked_for_once_for_each_set_of_adapters() -> None:
    text = """lora 1
    adapter one { rank = 2 target up }
    adapter two { rank = 2 target proj }"""
    model = lora_fx.compile(Reading(), text, backend=None)
    x = torch.randn(4, 5)
    model(x)
    assert model.lora_fx_watched == {(("one",), True)}
    twin = copy.deepcopy(model)
    model.set_adapter("two")
    assert refusal(model, x) == [("proj", "return F.linear(y, self.proj.weight)")]
    with model.disable_adapter():
        model(x)
    assert twin.lora_fx_watched == {(("one",), True)}
    assert not any(module._forward_pre_hooks for module in model.modules())
