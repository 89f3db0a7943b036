"""Adapters, and models trained whole, made plain LoRA of a rank."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.combine.low_rank import low_rank
from tests.adapters.convolutions import CASES
from tests.adapters.kinds import of, scatter
from tests.dense import relative
from tests.runtime.test_combine import FEATURES, effective, loaded_by_peft
from tests.runtime.test_merge import logits
from tests.tiny import llama, tokens

FULL = 32  # the smaller side of every layer


def compiled(feature: str, more: str = "") -> Any:
    text = f"lora 1 adapter default {{ rank = 4 init = random {FEATURES[feature]} {more}"
    text = text.replace("init = random init", "init") + " target q_proj, up_proj }"
    model: Any = lora_fx.compile(llama(2), text, backend=None).eval()
    scatter(model)
    return model


@pytest.mark.parametrize("feature", FEATURES)
def test_exact_where_the_rank_suffices_and_else_the_best(feature: str) -> None:
    model = compiled(feature, 'train "model.norm" tokens [3, 7]')
    whole, want = effective(model, "default"), logits(model)
    errors = model.convert_adapter("default", "all", FULL)
    assert set(errors) == set(whole)
    assert max(errors.values()) < 1e-6
    small = model.convert_adapter("default", "small", 3)
    for fqn, delta in whole.items():
        S = torch.linalg.svdvals(delta)
        best = (S[3:].square().sum() / S.square().sum()).sqrt().item()
        assert relative(effective(model, "all")[fqn], delta) < 1e-5
        assert abs(small[fqn] - best) < 1e-4 * best
        assert abs(relative(effective(model, "small")[fqn], delta) - best) < 1e-4
    assert {site.variant.name for site in model.lora_fx_adapters["all"].sites} == {"lora"}
    assert model.active_adapters() == ["default"]
    model.set_adapter("all")
    assert relative(logits(model), want) < 1e-5
    model.set_adapter([])
    assert relative(logits(model), want) > 1e-3


def test_a_share_of_the_squares() -> None:
    model = compiled("rslora")
    whole = effective(model, "default")
    errors = model.convert_adapter("default", "new", 0.9)
    for site in model.lora_fx_adapters["new"].sites:
        S = torch.linalg.svdvals(whole[site.fqn]).square()
        assert S[: site.rank].sum() >= 0.9 * S.sum() > S[: site.rank - 1].sum()
        assert errors[site.fqn] ** 2 <= 0.1 + 1e-6


@pytest.mark.parametrize("case", ["1d, groups", "2d"])
def test_convolutions(case: str) -> None:
    kind, x = CASES[case].kind.__name__, CASES[case].x()
    text = f'lora 1 adapter default {{ rank = 4 init = random target class "{kind}" }}'
    model: Any = lora_fx.compile(CASES[case].layer(), text, backend=None).eval()
    scatter(model)
    want = model(x)
    assert max(model.convert_adapter("default", "new", 4).values()) < 1e-6
    model.set_adapter("new")
    assert relative(model(x), want) < 1e-5
    assert relative(CASES[case].layer()(x), want) > 1e-3


def test_groups_are_decomposed_by_themselves() -> None:
    delta = torch.randn(6, 5)
    found = low_rank(delta, 4, 2)
    products = torch.cat([B @ A for A, B in zip(found.A.chunk(2), found.B.chunk(2), strict=True)])
    best = torch.cat([_best(part, 2) for part in delta.chunk(2)])
    assert relative(products, best) < 1e-6
    assert found.error == pytest.approx(relative(products, delta), rel=1e-5)


def _best(delta: Tensor, rank: int) -> Tensor:
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank] * S[:rank] @ V[:rank]


def changed(base: nn.Module, rank: int) -> nn.Module:
    """A model trained whole: matrices by a change of a rank, everything else at all."""
    tuned, generator = copy.deepcopy(base), torch.Generator().manual_seed(3)
    seen: set[int] = set()
    for module in tuned.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            shape = parameter.shape
            if isinstance(module, nn.Linear) and parameter.dim() == 2:
                factors = ((shape[0], rank), (rank, shape[1]))
                A, B = (torch.randn(size, generator=generator) for size in factors)
                parameter.data += 0.05 * A @ B
            else:
                parameter.data += 0.05 * torch.randn(shape, generator=generator)
    return tuned


MODELS = {
    "llama": lambda: llama(2, attention_bias=True),
    "tied": lambda: llama(2, tie_word_embeddings=True),
    "gpt2": of("gpt2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_difference_of_a_model_trained_whole(name: str, tmp_path: Path) -> None:
    base = MODELS[name]().eval()
    tuned = changed(base, 3).eval()
    rank = FULL * 4 if name == "gpt2" else 3
    errors = lora_fx.convert(tuned, base, rank, tmp_path / "out")
    assert errors
    assert max(errors.values()) < 1e-5
    want, ids = tuned(tokens()).logits, tokens()
    loaded: Any = lora_fx.load(tmp_path / "out", MODELS[name](), backend=None).eval()
    with torch.no_grad():
        assert relative(loaded(ids).logits, want) < 1e-5
        assert relative(base(ids).logits, want) > 1e-2
    if name == "llama":  # of tied weights PEFT ties copies by another rule
        theirs = loaded_by_peft(tmp_path / "out", MODELS[name]())
        with torch.no_grad():
            assert relative(theirs(ids).logits, want) < 1e-5
    small = lora_fx.convert(tuned, base, 1, tmp_path / "small")
    assert min(small.values()) > 0.1


def test_a_grouped_convolution_is_kept_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv1d(6, 4, 3, groups=2), nn.Linear(5, 3))
    tuned, x = copy.deepcopy(base), torch.randn(2, 6, 7)
    for parameter in tuned.parameters():
        parameter.data += 1
    want = tuned(x)
    lora_fx.convert(tuned, base, 3, tmp_path / "out")
    loaded = lora_fx.load(tmp_path / "out", copy.deepcopy(base), backend=None)
    assert relative(loaded(x), want) < 1e-5
    assert relative(base(x), want) > 1e-2


def test_a_folder_becomes_a_folder(tmp_path: Path) -> None:
    model = compiled("dora", 'train "model.norm"')
    want = logits(model)
    model.save_pretrained(tmp_path / "dora")
    errors = lora_fx.convert(tmp_path / "dora", llama(2), FULL, tmp_path / "plain")
    assert max(errors.values()) < 1e-6
    theirs = loaded_by_peft(tmp_path / "plain", llama(2))
    assert not theirs.peft_config["default"].use_dora
    with torch.no_grad():
        assert relative(theirs(tokens()).logits, model(tokens()).logits) < 1e-5
    loaded: Any = lora_fx.load(tmp_path / "plain", llama(2), backend=None).eval()
    assert relative(logits(loaded), want) < 1e-5


def test_intruders_as_peft(tmp_path: Path) -> None:
    model = compiled("rslora")
    for site in model.lora_fx_adapters["default"].sites:
        model.get_submodule(site.fqn).lora_B["default"].weight.data.mul_(8)
    model.save_pretrained(tmp_path)
    found = model.reduce_intruder_dimensions("default", top_k=6, mitigation_lambda=0.4)
    assert sum(found.values()) > 4
    theirs: Any = loaded_by_peft(tmp_path, llama(2))
    reduce_intruder_dimension(theirs, top_k=6, mitigation_lambda=0.4, logging_sink=lambda *_: None)
    before, after = effective(model, "default"), effective(model, "intruder_reduced")
    for name, module in theirs.named_modules():
        fqn = name.removeprefix("base_model.model.")
        if fqn in after and hasattr(module, "lora_A"):
            assert relative(after[fqn], module.get_delta_weight("intruder_reduced")) < 1e-4
            assert (relative(after[fqn], before[fqn]) > 1e-2) == (found[fqn] > 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("default", "new", 0), "is no rank"),
        (("default", "new", True), "is no rank"),
        (("default", "default", 2), "there is an adapter"),
        (("other", "new", 2), "there is no adapter `other`"),
    ],
)
def test_what_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(lora_fx.LoraFxError, match=message):
        compiled("rslora").convert_adapter(*arguments)


def test_models_that_are_the_same_or_of_others(tmp_path: Path) -> None:
    with pytest.raises(lora_fx.LoraFxError, match="same weights"):
        lora_fx.convert(llama(2), llama(2), 2, tmp_path / "out")
    untied = llama(2, tie_word_embeddings=True)
    untied.lm_head.weight = nn.Parameter(2 * untied.lm_head.weight.detach())
    with pytest.raises(lora_fx.LoraFxError, match=r"`lm_head` share a weight in the base, and no"):
        lora_fx.convert(untied, llama(2, tie_word_embeddings=True), 2, tmp_path / "out")
    embedded = llama(2)
    embedded.model.embed_tokens.weight.data.mul_(2)
    with pytest.raises(lora_fx.LoraFxError, match=r"only `model\.embed_tokens` changed"):
        lora_fx.convert(embedded, llama(2), 2, tmp_path / "out")
    with pytest.raises(lora_fx.LoraFxError, match=r"no `model\.layers"):
        lora_fx.convert(llama(1), llama(2), 2, tmp_path / "out")
    text = "lora 1 adapter a { init = loftq target q_proj }"
    model: Any = lora_fx.compile(llama(2), text, backend=None)
    with pytest.raises(lora_fx.LoraFxError, match="put another weight"):
        model.convert_adapter("a", "b", 2)
    assert not (tmp_path / "out").exists()
