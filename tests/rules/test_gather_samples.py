"""The rule that gives samples their own factors, and what it leaves to the site."""

from typing import Any

import pytest
from expecttest import assert_expected_inline

import lora_fx
from lora_fx.graph.verify import Stage
from lora_fx.rewrite.driver import misses
from lora_fx.rules import gather_samples
from lora_fx.rules.gather_samples import GatherSamples
from tests.tiny import llama, tokens

SPEC = """lora 1
adapter a { rank = 4 target q_proj, k_proj }
adapter b { rank = 3 target q_proj, k_proj }
adapter d { rank = 2 variant = dora target q_proj }
route { when "mix" -> 0.5 * a - b }
"""


def lines(stage: Stage) -> str:
    model = lora_fx.compile(llama(1), SPEC, backend="eager").eval()
    ids = tokens(5, 33)
    program = lora_fx.capture(model, input_ids=ids, adapter_names=["a", "b", "d", "a", "b"])
    text = program.text(stage).splitlines()
    ends = next(i for i, line in enumerate(text) if "@self_attn.k_proj.weight" in line)
    kept = (line.partition("   #")[0] for line in text[:ends] if "   #" in line)
    return "\n".join(kept).replace("@self_attn.q_proj.", "@")


def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_samples, "is_gathered", lambda *_: True)
    assert_expected_inline(
        lines("adapted"),
        """\
%narrow: f32[1] = narrow(@lora_mixed_scalings, 0, 2, 1)
%cat_2: f32[1] = cat([%narrow])
%shrink_default: f32[5, 33, 2] = lora_fx.shrink(%hidden_states_2, @lora_A.d.weight, 0.0, 'activation')
%share_default: f32[5, 1, 1] = lora_fx.share(%to_2, 2, False, 3)
%expand_default: f32[5, 33, 32] = lora_fx.expand(%output, %shrink_default, @lora_B.d.weight, %cat_2, 0, 'activation', None, %share_default)
%expand_default_1: f32[5, 33, 32] = lora_fx.expand(%output, %shrink_default, @lora_B.d.weight, %cat_2, 0, 'activation')
%norms_default: f32[32] = lora_fx.norms(@weight, @lora_A.d.weight, @lora_B.d.weight, %cat_2, 0, 1.0)
%magnitude_default: f32[5, 33, 32] = lora_fx.magnitude(%expand_default, %expand_default_1, @lora_magnitude_vector.d.weight, %norms_default, None, %share_default)
%choose_default: i64[5, 2] = lora_fx.choose(%to_2, [0, 1], 2)
%sample_scalings_default: f32[5, 2] = lora_fx.sample_scalings(%to_2, @lora_mixed_scalings, [0, 1], [0, 1], %choose_default)
%pick_default: f32[5, 8, 32] = lora_fx.pick([@lora_A.a.weight, @lora_A.b.weight], %choose_default, 4, False)
%pick_default_1: f32[5, 32, 8] = lora_fx.pick([@lora_B.a.weight, @lora_B.b.weight], %choose_default, 4, True)
%sample_shrink_default: f32[5, 33, 8] = lora_fx.sample_shrink(%hidden_states_2, %pick_default, 0.0, 'activation')
%sample_expand_default: f32[5, 33, 32] = lora_fx.sample_expand(%magnitude_default, %sample_shrink_default, %pick_default_1, %sample_scalings_default, 'activation')""",
    )


def test_it_says_why_not() -> None:
    model: Any = lora_fx.compile(llama(1), SPEC, backend="eager").eval()
    ids = tokens(5, 33)

    def reasons(**names: Any) -> set[str]:
        graph = lora_fx.capture(model, input_ids=ids, **names).at("captured")
        return {why for _, _, why in misses([GatherSamples()], graph)} - {"not a site"}

    assert reasons(adapter_names=["a"] * 5) == {"to compute every adapter costs less"}
    assert model.lora_fx_routing.shares is None, "a capture leaves nothing behind"
    model.set_adapter("a")
    assert reasons() == {"all samples have the same adapters"}
