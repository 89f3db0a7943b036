"""Another adapter in the place of one that is compiled: its outputs, and no graph is made."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.adapters.peft.keys import live_tensors
from tests.adapters.convolutions import CASES
from tests.adapters.kinds import scatter
from tests.adapters.test_experts import KINDS as EXPERTS
from tests.dense import relative
from tests.runtime.test_combine import loaded_by_peft
from tests.runtime.test_merge import logits
from tests.tiny import graphs, llama, step, tokens

BIASED = {"attention_bias": True, "mlp_bias": True}
TWO = "target q_proj, up_proj"
BLOCKS = f'variant = bdlora(a = ["q_proj"], b = ["up_proj"], blocks = 2) {TWO}'
PAIRS = {  # the adapter that is there, and the one that takes its place
    "rank": (f"rank = 6 {TWO}", f"rank = 4 alpha = 7 {TWO}"),
    "rslora": (f"rank = 6 {TWO}", f"rank = 3 alpha = 7 scaling = rslora {TWO}"),
    "fewer modules": (f"rank = 6 {TWO}", "rank = 3 target up_proj"),
    "ranks by module": (
        f"rank = 6 {TWO}",
        "rank = 2 target q_proj { rank = 6 alpha = 9 } target up_proj { alpha = 3 }",
    ),
    "dora": (f"rank = 6 variant = dora {TWO}", "rank = 3 variant = dora target q_proj"),
    "lora in dora": (f"rank = 6 variant = dora {TWO}", f"rank = 4 {TWO}"),
    "biases": (
        f"rank = 6 bias = all lora_bias = true {TWO}",
        "rank = 2 bias = lora_only lora_bias = true target up_proj",
    ),
    "biases where nothing is adapted": (
        f"rank = 6 bias = all {TWO}",
        "rank = 2 bias = all target up_proj",
    ),
    "embeddings": ("rank = 6 target embed_tokens, q_proj", "rank = 2 target embed_tokens"),
    "copies": (
        'rank = 6 target q_proj train "model.norm", v_proj',
        "rank = 2 target q_proj train v_proj",
    ),
    "rows": ("rank = 6 target q_proj tokens [3, 7, 50]", "rank = 2 target q_proj tokens [50, 3]"),
    "rows beneath": (
        "rank = 6 target embed_tokens tokens [3, 7]",
        "rank = 2 target embed_tokens tokens [7]",
    ),
    "blocks": (f"rank = 6 {BLOCKS}", f"rank = 4 {BLOCKS}"),
    "velora": ("rank = 6 variant = velora(num_groups = 4) target q_proj", "rank = 3 target q_proj"),
    "kasa": ("variant = kasa target q_proj", "alpha = 11 variant = kasa target q_proj"),
    "pissa in lora": ("rank = 6 target q_proj", "init = pissa rank = 3 target q_proj"),
    "lora in pissa": ("init = pissa rank = 6 target q_proj", "rank = 4 target q_proj"),
    "pissa in pissa": (
        "init = pissa rank = 6 target q_proj",
        "init = pissa rank = 3 target q_proj",
    ),
}
NOT_BY_PEFT = ("rows beneath", "pissa in pissa", "pissa in lora")


def compiled(adapter: str, backend: Any = None, tied: bool = False) -> Any:
    start = "" if "init" in adapter else "init = random"
    text = f"lora 1 adapter default {{ {start} {adapter} }}"
    base = llama(2, tie_word_embeddings=tied, **BIASED)
    model: Any = lora_fx.compile(base, text, backend=backend).eval()
    scatter(model)
    return model


def saved(adapter: str, folder: Path, tied: bool = False) -> Path:
    other = compiled(adapter, tied=tied)
    for tensor in live_tensors(other, "default").values():
        tensor.data.mul_(1.5)
    other.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pair", PAIRS)
def test_it_computes_what_the_other_does_and_no_graph_is_made(pair: str, tmp_path: Path) -> None:
    there, other = PAIRS[pair]
    folder = saved(other, tmp_path / "other")
    model = compiled(there, "eager")
    before = logits(model)
    step(model.train(), tokens(2, 11))
    made = graphs()
    parameters = {id(p) for name, p in model.named_parameters() if "lora_" in name}
    model.hotswap_adapter(folder)
    got = logits(model.eval())
    want = logits(lora_fx.load(folder, llama(2, **BIASED), backend=None).eval())
    assert relative(got, want) < 1e-5
    assert relative(got, before) > 1e-3
    step(model.train(), tokens(2, 11))
    assert graphs() == made
    if not pair.endswith(" pissa"):  # whose start is another
        assert {id(p) for name, p in model.named_parameters() if "lora_" in name} == parameters
    with model.disable_adapter():
        assert relative(logits(model.eval()), logits(llama(2, **BIASED).eval())) < 1e-5


@pytest.mark.parametrize("pair", [p for p in PAIRS if p not in NOT_BY_PEFT])
def test_what_was_swapped_in_is_saved_for_us_and_for_peft(pair: str, tmp_path: Path) -> None:
    there, other = PAIRS[pair]
    model = compiled(there)
    model.hotswap_adapter(saved(other, tmp_path / "other"))
    model.save_pretrained(tmp_path / "again")
    loaded = lora_fx.load(tmp_path / "again", llama(2, **BIASED), backend=None).eval()
    assert relative(logits(loaded), logits(model)) < 1e-5
    theirs = loaded_by_peft(tmp_path / "again", llama(2, **BIASED))
    with torch.no_grad():
        assert relative(theirs(tokens()).logits, model(tokens()).logits) < 1e-5


def test_a_tied_adapter_is_swapped_for_another(tmp_path: Path) -> None:
    adapter = "tie = true target embed_tokens"
    folder = saved(f"rank = 2 {adapter}", tmp_path / "other", tied=True)
    model = compiled(f"rank = 5 {adapter}", "eager", tied=True)
    model.hotswap_adapter(folder)
    base = llama(2, tie_word_embeddings=True, **BIASED)
    want = logits(lora_fx.load(folder, base, backend=None).eval())
    assert relative(logits(model), want) < 1e-5
    assert relative(logits(base.eval()), want) > 1e-3


def test_a_tied_adapter_is_loaded_over_with_another_scaling(tmp_path: Path) -> None:
    adapter = "tie = true target embed_tokens"
    folder = saved(f"rank = 3 alpha = 11 {adapter}", tmp_path / "other", tied=True)
    model = compiled(f"rank = 3 {adapter}", tied=True)
    model.load_adapter(folder)
    base = llama(2, tie_word_embeddings=True, **BIASED)
    want = logits(lora_fx.load(folder, base, backend=None).eval())
    assert relative(logits(model), want) < 1e-5


@pytest.mark.parametrize("case", ["1d, groups", "2d"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_convolutions(case: str, variant: str, tmp_path: Path) -> None:
    if CASES[case].groups > 1 and variant == "dora":
        variant = "lora"
    text = 'lora 1 adapter default {{ rank = {} init = random {} target class "{}" }}'
    kind, found = CASES[case].kind.__name__, {}
    for rank in (2, 4):
        layer, how = CASES[case].layer(), f"variant = {variant}"
        model: Any = lora_fx.compile(layer, text.format(rank, how, kind), backend="eager").eval()
        scatter(model)
        found[rank] = model
    found[2].save_adapters(tmp_path)
    x = CASES[case].x()
    want, before = found[2](x), found[4](x)
    made = graphs()
    found[4].hotswap_adapter(tmp_path)
    assert relative(found[4](x), want) < 1e-5
    assert relative(before, want) > 1e-3
    assert graphs() == made


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts(name: str, tmp_path: Path) -> None:
    """Of a smaller rank, one of both stacks only: each expert gets what is its own."""
    kind, found = EXPERTS[name], {}
    for rank, stacks in (5, "{gate_up_proj,down_proj}"), (2, "down_proj"):
        target = f'rank = {rank} init = random target parameter "**.experts.{stacks}"'
        model: Any = lora_fx.compile(
            kind.base(), f"lora 1 adapter default {{ {target} }}", backend="eager"
        ).eval()
        scatter(model)
        found[rank] = model
    found[2].save_pretrained(tmp_path)
    want, before = (logits(found[rank]) for rank in (2, 5))
    made = graphs()
    found[5].hotswap_adapter(tmp_path)
    assert relative(logits(found[5]), want) < 1e-5
    assert relative(before, want) > 1e-3
    assert graphs() == made
    with pytest.raises(lora_fx.LoraFxError, match="gate_up_proj`, which the one"):
        found[2].hotswap_adapter(saved_again(found[5], tmp_path / "again"))


def saved_again(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_some_sites_with_magnitudes(tmp_path: Path) -> None:
    """In the folder all have one; where there is none it says ‖W + s B A‖."""
    mixed = "rank = 3 target q_proj { variant = dora } target up_proj"
    model = compiled(mixed.replace("3", "5"))
    model.hotswap_adapter(saved(mixed, tmp_path / "other"))
    want = logits(lora_fx.load(tmp_path / "other", llama(2, **BIASED), backend=None).eval())
    assert relative(logits(model), want) < 1e-5


def test_inductor_s_code_goes_on(tmp_path: Path) -> None:
    folder = saved("rank = 3 target q_proj", tmp_path / "other")
    model = compiled("rank = 6 target q_proj, up_proj", "inductor")
    logits(model)
    made = graphs()
    model.hotswap_adapter(folder)
    want = logits(lora_fx.load(folder, llama(2, **BIASED), backend=None).eval())
    assert relative(logits(model), want) < 1e-5
    assert graphs() == made


REFUSED = {
    "there is room for 2": ("rank = 2 target q_proj", "rank = 3 target q_proj"),
    r"adapts `model.layers.\*.self_attn.v_proj`": ("target q_proj", "target q_proj, v_proj"),
    "it is `dora`": ("target q_proj", "variant = dora target q_proj"),
    "has a bias on B": ("target q_proj", "lora_bias = true target q_proj"),
    "trains `model.norm`": ("target q_proj", 'target q_proj train "model.norm"'),
    "trains rows 9 of": ("target q_proj tokens [3]", "target q_proj tokens [3, 9]"),
    "other blocks": (BLOCKS, f"rank = 4 {BLOCKS.replace('blocks = 2', 'blocks = 4')}"),
    "whose weight the one": ("init = pissa target q_proj", "variant = dora target q_proj"),
    "it is no `kasa` of rank 8": (
        "variant = kasa target q_proj",
        "rank = 3 variant = kasa target q_proj",
    ),
    "it is no `kasa`": ("variant = kasa target q_proj", "target q_proj"),
    "another weight": ("init = loftq target q_proj", "target q_proj"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_changes(message: str, tmp_path: Path) -> None:
    there, other = REFUSED[message]
    model = compiled(there)
    folder = saved(other, tmp_path / "other")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(lora_fx.LoraFxError, match=message):
        model.hotswap_adapter(folder)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_merged_adapter_is_not_swapped(tmp_path: Path) -> None:
    model = compiled("target q_proj")
    model.merge_adapter()
    with pytest.raises(lora_fx.LoraFxError, match="is merged"):
        model.hotswap_adapter(saved("target q_proj", tmp_path / "other"))
