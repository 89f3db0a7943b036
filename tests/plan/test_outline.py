"""First files for models of many kinds, and everything that they offer."""

import pytest
from torch import nn

from lora_fx.diagnostics import LoraFxError, Source
from lora_fx.plan.outline import outline_of
from lora_fx.plan.plan import Plan, plan_sites
from lora_fx.spec import parse
from lora_fx.spec.formatter import format_source
from lora_fx.spec.starter import Choice, Outline, choices, starter_text
from tests.architectures import ARCHITECTURES, on_meta
from tests.plan.models import Tower

OFFERED = ("llama", "gpt2", "bert", "t5", "vit", "mixtral", "deepseek_v3")


def started(tree: nn.Module) -> tuple[Outline, str, Plan]:
    """The outline of a model, its first file, and the plan of that, with a bound from it."""
    outline = outline_of(tree)
    draft = plan_sites(parse(starter_text(outline, "m", 1.0)), tree)
    text = starter_text(outline, "m", draft.trainable / draft.all)
    return outline, text, plan_sites(parse(text), tree)


def switched_on(text: str, choice: Choice) -> str:
    """The file with one of its comments made code, and without its bound."""
    lines = text.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.strip() == f"# {choice.why}:")
    for i in range(start + 1, start + 1 + len(choice.code)):
        assert lines[i].lstrip().startswith("# ")
        lines[i] = lines[i].replace("# ", "", 1)
    return "\n".join(line for line in lines if not line.startswith("check"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_model_has_a_first_file(name: str) -> None:
    _, text, plan = started(on_meta(name))
    assert plan.sites
    assert not plan.notes
    assert format_source(Source("", text)) == text
    (bound,) = (float(line.split()[-1][:-1]) for line in text.splitlines() if "check" in line)
    assert plan.trainable / plan.all < bound / 100 <= 1.3 * plan.trainable / plan.all


@pytest.mark.parametrize("name", OFFERED)
def test_what_it_offers_fits_to_the_model(name: str) -> None:
    tree = on_meta(name)
    outline, text, before = started(tree)
    offered = list(choices(outline))
    assert len(offered) > 5
    for choice in offered:
        plan = plan_sites(parse(switched_on(text, choice)), tree)
        assert not plan.notes, choice.why
        assert plan.to_json() != before.to_json() or choice.code[0].startswith("target")


def test_heads_of_tasks_are_trained_and_not_adapted() -> None:
    for name, head in (("bert", "classifier"), ("roberta", "qa_outputs"), ("vit", "classifier")):
        outline, text, plan = started(on_meta(name))
        assert list(outline.heads) == [head]
        assert [module.fqn for module in plan.trained] == [head]
        assert f'train "{head}"' in text
    for name in ("llama", "t5", "whisper", "llava"):
        assert not outline_of(on_meta(name)).heads


def test_the_outline_of_a_llama() -> None:
    outline = outline_of(on_meta("llama"))
    assert outline.stacks == {"model.layers": 3}
    assert [*outline.names] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    first = outline.shapes[0]
    assert (first.pattern, first.count) == ("model.layers.*.self_attn.q_proj", 3)
    assert (outline.head, outline.norm, outline.tokens) == ("lm_head", "model.norm", True)
    assert (outline.plain, outline.experts, outline.narrowest) == (True, None, 16)


def test_what_other_models_have() -> None:
    assert not outline_of(on_meta("gpt2")).plain
    assert not outline_of(on_meta("vit")).tokens
    mixtral = outline_of(on_meta("mixtral"))
    assert mixtral.experts == "model.layers.*.mlp.experts.{gate_up_proj,down_proj}"
    assert outline_of(on_meta("t5")).stacks == {"encoder.block": 3, "decoder.block": 3}


def test_modules_that_are_no_transformers() -> None:
    outline, text, plan = started(Tower())
    assert outline.stacks == {"blocks": 3}
    assert outline.narrowest == 2
    assert "rank  = min(16, module.in_features, module.out_features)" in text
    assert len(plan.sites) == 9


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(LoraFxError) as raised:
        started(nn.Sequential(nn.Conv1d(3, 5, 2)))
    assert [d.code for d in raised.value.diagnostics] == ["unmatched-target"]
