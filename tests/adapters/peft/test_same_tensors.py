"""With the same A and B, everything PEFT computes is computed here."""

import pytest
from peft import LoraConfig
from torch import nn

import lora_fx
from tests.adapters.peft.both import (
    PREFIX,
    PROJECTIONS,
    assert_same_logits,
    copy_into_peft,
    logits,
    peft_model,
)
from tests.tiny import assert_differ, assert_equal, llama, step, tokens

PLAIN = "adapter default { rank = 3 alpha = 5 init = random target linear }"
RSLORA = "adapter default { rank = 3 alpha = 5 scaling = rslora init = random target linear }"
PATTERNS = """adapter default { rank = 3 alpha = 5 init = random
  target linear
  target v_proj { rank = 7 alpha = 2 }
  target gate_proj in layers [1..3] { alpha = 2 } }"""
PATTERN_SETTINGS = {
    "rank_pattern": {"v_proj": 7},
    "alpha_pattern": {"v_proj": 2, r"layers\.[12]\..*\.gate_proj": 2},
}


def both(text: str, backend: str | None = "eager", **settings) -> tuple[nn.Module, nn.Module]:
    ours = lora_fx.compile(llama(4), f"lora 1\n{text}", backend=backend)
    theirs = peft_model(**settings)
    copy_into_peft(ours, theirs)
    return ours, theirs


def in_our_names(tensors: dict) -> dict:
    return {name.removeprefix(PREFIX).replace(".base_layer", ""): t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        (PLAIN, {}),
        (RSLORA, {"use_rslora": True}),
        (PATTERNS, PATTERN_SETTINGS),
    ],
    ids=["plain", "rslora", "patterns"],
)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_loss_gradients_and_logits(text: str, settings: dict, backend: str | None) -> None:
    ours, theirs = both(text, backend, **settings)
    grads = step(ours, tokens())
    assert len(grads) == 1 + 2 * 4 * len(PROJECTIONS)
    assert_equal(grads, in_our_names(step(theirs, tokens())))
    assert_same_logits(ours, theirs)


def test_active_adapters_add_up() -> None:
    text = """
adapter one { rank = 3 alpha = 5 init = random target linear }
adapter two { rank = 2 alpha = 7 init = random seed = 4 target q_proj, down_proj }
adapter idle { rank = 5 init = random seed = 9 target linear }"""
    ours = lora_fx.compile(llama(4), f"lora 1\n{text}", backend="eager")
    theirs = peft_model(name="one")
    for name, rank, alpha, targets in (
        ("two", 2, 7, ["q_proj", "down_proj"]),
        ("idle", 5, 5, PROJECTIONS),
    ):
        theirs.add_adapter(name, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    for name in ("one", "two", "idle"):
        copy_into_peft(ours, theirs, name)
    ours.set_adapter(["one", "two"])
    theirs.base_model.set_adapter(["one", "two"])
    # Where the branches are added one by one, some CPUs round the deepest gradients to 1.2e-5.
    assert_equal(step(ours, tokens()), in_our_names(step(theirs, tokens())), tolerance=2e-5)
    assert_same_logits(ours, theirs)
    ours.set_adapter("one")
    assert_differ([logits(ours)], [logits(theirs)])
