"""The rule that lets kernels choose a sample's factors, and what is joined afterwards."""

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from transformers import GPT2Config, GPT2LMHeadModel

import lora_fx
from lora_fx import kernels
from lora_fx.graph.verify import Stage
from lora_fx.rewrite.driver import misses
from lora_fx.rules import pick_in_kernel
from lora_fx.rules.pick_in_kernel import PickInKernel
from tests.tiny import VOCABULARY, llama, tokens

SPEC = """lora 1
adapter a { rank = 4 target q_proj, k_proj, gate_proj, up_proj }
adapter b { rank = 3 target q_proj, k_proj, gate_proj, up_proj }
route { }
"""


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "are_on", lambda *_: True)


def program(spec: str = SPEC, length: int = 1, base: Any = None, **more: Any) -> Any:
    model = lora_fx.compile(base or llama(1), spec, backend="eager").eval()
    names = ["a", "__base__", "b", "a", "b"]
    with torch.no_grad():
        return lora_fx.capture(model, input_ids=tokens(5, length), adapter_names=names, **more)


def lines(stage: Stage, containing: str, **of: Any) -> str:
    text = program(**of).text(stage).splitlines()
    kept = (line.partition("   #")[0] for line in text if containing in line)
    return "\n".join(kept).replace("@self_attn.", "@").replace("@mlp.", "@")


def test_text() -> None:
    assert_expected_inline(
        lines("adapted", "q_proj"),
        """\
%output: f32[5, 1, 32] = linear(%hidden_states_2, @q_proj.weight, None)
%picked_shrink_default: f32[1, 1, 5, 1, 4] = lora_fx.picked_shrink(%hidden_states_2, [@q_proj.lora_A.a.weight, @q_proj.lora_A.b.weight], 1, %choose_default, 4, 512, torch.float32)
%narrow_1: f32[2] = narrow(@q_proj.lora_mixed_scalings, 0, 0, 2)
%picked_expand_default = lora_fx.picked_expand([%output], %picked_shrink_default, [@q_proj.lora_B.a.weight, @q_proj.lora_B.b.weight], %choose_default, %gather, [%narrow_1], torch.float32, '')""",
    )


def test_sites_of_one_input_share_their_kernels() -> None:
    assert_expected_inline(
        lines("fused", "picked", length=2),
        """\
%picked_shrink_default_4: f32[2, 1, 5, 2, 4] = lora_fx.picked_shrink(%hidden_states_2, [@q_proj.lora_A.a.weight, @q_proj.lora_A.b.weight, @k_proj.lora_A.a.weight, @k_proj.lora_A.b.weight], 2, %choose_default, 4, 2048, torch.float32)
%sum_5: f32[2, 1, 5, 2, 4] = sum(%picked_shrink_default_4, 1, True)
%picked_expand_default_4 = lora_fx.picked_expand([%output, %output_1], %sum_5, [@q_proj.lora_B.a.weight, @q_proj.lora_B.b.weight, @k_proj.lora_B.a.weight, @k_proj.lora_B.b.weight], %choose_default, %gather, [%narrow_1, %narrow_3], torch.float32, '')
%getitem_4: f32[5, 2, 32] = getitem(%picked_expand_default_4, 0)
%getitem_5: f32[5, 2, 16] = getitem(%picked_expand_default_4, 1)
%picked_shrink_default_5: f32[2, 1, 5, 2, 4] = lora_fx.picked_shrink(%hidden_states_6, [@gate_proj.lora_A.a.weight, @gate_proj.lora_A.b.weight, @up_proj.lora_A.a.weight, @up_proj.lora_A.b.weight], 2, %choose_default, 4, 2048, torch.float32)
%sum_6: f32[2, 1, 5, 2, 4] = sum(%picked_shrink_default_5, 1, True)
%picked_expand_default_6 = lora_fx.picked_expand([%output_2, %output_3], %sum_6, [@gate_proj.lora_B.a.weight, @gate_proj.lora_B.b.weight, @up_proj.lora_B.a.weight, @up_proj.lora_B.b.weight], %choose_default, %gather, [%narrow_5, %narrow_7], torch.float32, 'silu')
%getitem_8: f32[5, 2, 44] = getitem(%picked_expand_default_6, 0)""",
    )


def test_what_reads_a_gate_does_not_see_it() -> None:
    """Nothing is left of the activation and the product."""
    text = program().text("fused")
    assert "silu" in text
    assert "silu(%" not in text
    assert "'silu')" in text


def test_a_gate_that_something_else_reads_stays() -> None:
    text = program(SPEC.replace("gate_proj, ", "")).text("fused")
    assert "silu(%" in text
    assert "'silu')" not in text


def reasons(spec: str = SPEC, **of: Any) -> set[str]:
    graph = program(spec, **of).at("captured")
    return {why for _, _, why in misses([PickInKernel()], graph)} - {"not a site"}


def test_it_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not reasons()
    many = "\n".join(f"adapter c{i} {{ rank = 2 target q_proj }}" for i in range(8))
    assert reasons(SPEC + many) == {"no branches that are cheaper to pick in a kernel"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reasons() == {"autocast decides what products are computed in"}
    monkeypatch.setattr(pick_in_kernel, "MAX_RANK", 3)
    assert reasons() == {"no branches that are cheaper to pick in a kernel"}


def test_not_where_gradients_are_wanted() -> None:
    model: Any = lora_fx.compile(llama(1), SPEC.replace("{ }", "{ train = true }"), backend="eager")
    text = lora_fx.capture(model, input_ids=tokens(2, 3), adapter_names=["a", "b"]).text("fused")
    assert "picked" not in text


def test_other_projections_are_not_joined() -> None:
    """Of GPT-2, each has an input of its own; the activation is no gate."""
    config = GPT2Config(
        n_embd=32,
        n_layer=1,
        n_head=2,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=None,
        n_positions=40,
    )
    torch.manual_seed(0)
    spec = SPEC.replace("q_proj, k_proj, gate_proj, up_proj", "c_attn, c_fc")
    text = program(spec, base=GPT2LMHeadModel(config)).text("fused")
    assert text.count("lora_fx.picked_expand(") == 2
    assert "join_picked" not in text
