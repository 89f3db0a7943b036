"""The rule that computes alike branches of a mixed batch together, and what it leaves alone."""

from typing import Any

import pytest
from expecttest import assert_expected_inline

import lora_fx
from lora_fx.graph.program import Program
from lora_fx.rewrite.driver import misses
from lora_fx.rules import gather_samples
from lora_fx.rules.join_branches import JoinBranches
from tests.tiny import llama, tokens

SPEC = """lora 1
adapter a { rank = 4 target q_proj }
adapter b { rank = 3 target q_proj, k_proj }
adapter d { rank = 2 variant = dora target k_proj }
"""


@pytest.fixture(autouse=True)
def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_samples, "is_gathered", lambda *_: False)


def program(spec: str, **names: Any) -> Program:
    model = lora_fx.compile(llama(1), spec, backend="eager").eval()
    return lora_fx.capture(model, input_ids=tokens(5, 33), **names)


def joined(spec: str) -> str:
    text = program(spec, adapter_names=["a"] * 5).text("adapted").splitlines()
    kept = [line.partition("   #")[0] for line in text if "   #" in line]
    ends = next(i for i, line in enumerate(kept) if "k_proj" in line) if "k_proj" in spec else None
    return "\n".join(kept[:ends]).replace("@self_attn.q_proj.", "@")


def test_text() -> None:
    assert_expected_inline(
        joined(SPEC),
        """\
%cat_2: f32[7, 32] = cat([@lora_A.a.weight, @lora_A.b.weight])
%cat_3: f32[32, 7] = cat([@lora_B.a.weight, @lora_B.b.weight], 1)
%spread_default: f32[7] = lora_fx.spread(@lora_mixed_scalings, [0, 1], [4, 3])
%spread_default_1: f32[5, 7] = lora_fx.spread(%to_2, [0, 1], [4, 3])
%shrink_default: f32[5, 33, 7] = lora_fx.shrink(%hidden_states_2, %cat_2, 0.0, 'activation')
%masked_expand_default: f32[5, 33, 32] = lora_fx.masked_expand(%output, %shrink_default, %cat_3, %spread_default, %spread_default_1, 'activation')""",
    )


def test_slots_need_no_cat() -> None:
    spec = "lora 1 adapter a { rank = 4 target q_proj } route { slots = 4  max_rank = 5 }"
    assert_expected_inline(
        joined(spec),
        """\
%narrow: f32[1] = narrow(@lora_mixed_scalings, 0, 0, 1)
%cat_2: f32[1] = cat([%narrow])
%shrink_default_1: f32[5, 33, 4] = lora_fx.shrink(%hidden_states_2, @lora_A.a.weight, 0.0, 'activation')
%share_default: f32[5, 1, 1] = lora_fx.share(%to_2, 0, False, 3)
%expand_default: f32[5, 33, 32] = lora_fx.expand(%output, %shrink_default_1, @lora_B.a.weight, %cat_2, 0, 'activation', None, %share_default)
%flatten: f32[15, 32] = flatten(@lora_slots.A, 0, 1)
%transpose: f32[32, 3, 5] = .transpose(@lora_slots.B, 0, 1)
%flatten_1: f32[32, 15] = flatten(%transpose, 1)
%spread_default: f32[15] = lora_fx.spread(@lora_mixed_scalings, [1, 2, 3], [5, 5, 5])
%spread_default_1: f32[5, 15] = lora_fx.spread(%to_2, [1, 2, 3], [5, 5, 5])
%shrink_default: f32[5, 33, 15] = lora_fx.shrink(%hidden_states_2, %flatten, 0.0, 'activation')
%masked_expand_default: f32[5, 33, 32] = lora_fx.masked_expand(%expand_default, %shrink_default, %flatten_1, %spread_default, %spread_default_1, 'activation')""",
    )


def test_it_says_why_not() -> None:
    def reasons(**names: Any) -> set[str]:
        graph = program(SPEC, **names).at("captured")
        return {why for _, _, why in misses([JoinBranches()], graph)} - {"not a site"}

    assert reasons(adapter_names=["a"] * 5) == {"no two branches are alike"}
    assert reasons() == {"all samples have the same adapters"}
