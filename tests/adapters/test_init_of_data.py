"""Inits that look at data, against PEFT's on the same data."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_loraga,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.init.principal import PrincipalComponents
from lora_fx.adapters.peft.keys import live_tensors
from tests.adapters.kinds import scatter
from tests.adapters.test_init_of_weight import PREFIX, theirs
from tests.cli.test_check import run
from tests.dense import relative
from tests.odd_models import Varied
from tests.tiny import llama, tokens

NAMES = ["q_proj", "up_proj", "down_proj"]
SPEC = "rank = 4  alpha = 6  init = {init}  target q_proj, up_proj  target down_proj {{ rank = 7 }}"
INITS = [
    "corda",
    "corda(method = kpm)",
    *(f"lora_ga(direction = {d})" for d in ("ArBr", "A2rBr", "ArB2r", "random")),
    *(f"lora_ga(scale = {s})" for s in ("stable", "weight_svd", "gd_scale", "unit")),
    "lora_ga(stable_gamma = 5)",
]


def batches() -> list[dict[str, Tensor]]:
    """Four samples, one a batch, with labels."""
    samples = [tokens(1, length) for length in (13, 17, 19, 29)]
    return [{"input_ids": ids, "labels": ids} for ids in samples]


def compiled(text: str, base: nn.Module, data: Any = None, **settings: Any) -> Any:
    text = f"lora 1 adapter default {{ {text} }}"
    return lora_fx.compile(base, text, backend=None, calibration=data, **settings)


def by_peft(init: str, use_rslora: bool = False) -> nn.Module:
    base = llama(2).eval()
    name, _, arguments = init.rstrip(")").partition("(")
    given: dict[str, Any] = dict(part.split(" = ") for part in arguments.split(", ") if part)
    common: dict[str, Any] = {"rank_pattern": {"down_proj": 7}, "use_rslora": use_rslora}
    common |= {"r": 4, "lora_alpha": 6, "target_modules": NAMES, "init_lora_weights": name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "corda":
            config = LoraConfig(
                corda_config=CordaConfig(corda_method=given.get("method", "ipm")), **common
            )
            preprocess_corda(base, config, lambda: [base(**batch) for batch in batches()])
        else:
            given = {k: float(v) if k == "stable_gamma" else v for k, v in given.items()}
            config = LoraConfig(lora_ga_config=LoraGAConfig(**given), **common)
            preprocess_loraga(base, config, lambda: [base(**b).loss.backward() for b in batches()])
        return get_peft_model(base, config)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {fqn: site.weight for fqn, site in storage.sites(model)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", [i for i in INITS if "random" not in i])
def test_it_is_what_peft_makes(init: str, use_rslora: bool) -> None:
    """Up to the signs of singular vectors."""
    want = by_peft(init, use_rslora)
    scaling = "scaling = rslora " * use_rslora
    model = compiled(scaling + SPEC.format(init=init), llama(2), batches())
    own, named = live_tensors(model, "default"), theirs(want)
    tolerance = 3e-2 if "weight_svd" in init else 2e-3  # for PEFT the largest value is a guess
    assert len(weights(model)) == 6
    for fqn, weight in weights(model).items():
        for name in (f"{fqn}.lora_A.weight", f"{fqn}.lora_B.weight"):
            assert own[name].shape == named[name].shape
            assert relative(own[name].abs(), named[name].detach().abs()) < tolerance, name
            assert relative(own[name].abs().roll(1, 0), named[name].detach().abs()) > 0.1
        if init.startswith("corda"):
            left = want.get_submodule(f"{PREFIX}{fqn}").base_layer.weight
            assert relative(weight, left) < 1e-4
        assert relative(weight, llama(2).get_submodule(fqn).weight) > 1e-4


@pytest.mark.parametrize("init", INITS)
def test_it_starts_as_the_base_and_comes_back(init: str, tmp_path: Path) -> None:
    base = llama(2)
    flags = {n: (p.requires_grad, p.grad) for n, p in base.named_parameters()}
    model = compiled(SPEC.format(init=init), base.train(), batches())
    assert {n: (p.requires_grad, p.grad) for n, p in base.named_parameters()} == flags
    assert all(module.training for module in base.modules())
    assert relative(logits(model), logits(base)) < 2e-6
    again = compiled(SPEC.format(init=init), base, batches())
    assert all(torch.equal(w, weights(again)[fqn]) for fqn, w in weights(model).items())
    scatter(model)
    assert relative(logits(model), logits(base)) > 1e-2
    with model.disable_adapter():
        assert relative(logits(model), logits(base)) < 2e-6
    model.save_pretrained(tmp_path)
    again = lora_fx.load(tmp_path, llama(2), backend=None)
    assert torch.equal(logits(again), logits(model))


def test_random_directions_are_of_the_gradient() -> None:
    base = llama(1)
    text = "rank = 3 init = lora_ga(direction = random, scale = unit) target up_proj"
    model = compiled(text, base, batches())
    other = compiled(f"seed = 1 {text}", base, batches())
    weight = base.model.layers[0].mlp.up_proj.weight
    gradients = [torch.autograd.grad(base(**b).loss, weight)[0] for b in batches()]
    _, S, V = torch.linalg.svd(sum(gradients) / 4, full_matrices=False)
    A, B = live_tensors(model, "default").values()
    chosen = (A @ V.T).abs().argmax(1)
    assert len(set(chosen.tolist())) == 3
    assert chosen.max() < 6
    assert relative((A @ V.T).abs().amax(1), torch.ones(3)) < 1e-2
    assert relative(B.norm(dim=0), S[chosen]) < 1e-2
    assert not torch.equal(
        live_tensors(other, "default")["model.layers.0.mlp.up_proj.lora_A.weight"], A
    )


def test_padded_samples_count_for_what_they_are() -> None:
    """A batch of padded samples is as good as the samples themselves."""
    ids = torch.zeros(2, 19, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    single = [tokens(1, 13), tokens(1, 19)]
    for row, one in enumerate(single):
        ids[row, : one.shape[1]] = one
        mask[row, : one.shape[1]] = 1
    text = "rank = 4 init = corda target q_proj, down_proj"
    padded = compiled(text, llama(2), [{"input_ids": ids, "attention_mask": mask}])
    apart = compiled(text, llama(2), [{"input_ids": one} for one in single])
    careless = compiled(text, llama(2), [{"input_ids": ids}])
    for fqn, weight in weights(apart).items():
        assert relative(weights(padded)[fqn], weight) < 1e-4
    assert relative(weights(careless)[fqn], weight) > 1e-2


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_a_transposed_weight(init: str) -> None:
    class WithLoss(Varied):
        def forward(self, ids: Tensor) -> Any:
            output = super().forward(ids)
            return type("Output", (), {"loss": output.square().mean(), "output": output})

    ids = torch.tensor([[0, 3, 5, 7], [1, 3, 10, 0]])
    base = WithLoss().eval()
    model = compiled(f"rank = 3 init = {init} target mix, up", base, [{"ids": ids}])
    assert relative(model(ids).output, base(ids).output) < 2e-5
    assert relative(model.mix.weight, base.mix.weight) > 1e-3


@pytest.mark.parametrize("init", ["corda", "corda(use_float16_for_covariance = true)", "lora_ga"])
def test_half_precision(init: str) -> None:
    base = llama(2).bfloat16()
    whole = compiled(SPEC.format(init=init), llama(2), batches())
    model = compiled(SPEC.format(init=init), base, batches())
    assert relative(logits(model), logits(base)) < 3e-2
    for fqn, weight in weights(model).items():
        assert weight.dtype is torch.bfloat16
        assert relative(weight, base.get_submodule(fqn).weight) > 1e-4
        A = live_tensors(model, "default")[f"{fqn}.lora_A.weight"]
        named = live_tensors(whole, "default")[f"{fqn}.lora_A.weight"]
        assert A.dtype is torch.float32
        assert relative(A.abs(), named.abs()) < 0.5


REFUSED = {
    "an init without data": ("init = corda target q_proj", None, "there is none"),
    "data without an init": ("target q_proj", [{}], "no init of the spec looks at data"),
    "no batch": ("init = corda target q_proj", [], "no batch"),
    "no loss": ("rank = 4 init = lora_ga target q_proj", [{"input_ids": tokens()}], "needs a loss"),
    "no mapping": ("init = corda target q_proj", [tokens()], "is a `Tensor`"),
    "too large a rank": ("rank = 17 init = lora_ga target q_proj", [{}], "twice the rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    text, data, message = REFUSED[case]
    with pytest.raises(lora_fx.LoraFxError, match=message):
        compiled(text, llama(2), data)


def test_a_layer_that_no_data_reaches_and_numbers_that_are_not_finite() -> None:
    base = llama(2)
    base.unused = nn.Linear(8, 9)
    with pytest.raises(lora_fx.LoraFxError, match="no batch reaches `unused`"):
        compiled("rank = 4 init = corda target unused, q_proj", base, batches())
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(lora_fx.LoraFxError, match="not finite"):
        compiled("rank = 4 init = corda target q_proj", base, batches())


def with_tokenizer(folder: Path) -> Path:
    """A tiny Llama with a tokenizer of a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = WordLevel(
        {word: i for i, word in enumerate(["?", "a", "b", "c", "d", "e"])}, unk_token="?"
    )
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    llama(2).save_pretrained(folder)
    return folder


def test_a_text(tmp_path: Path) -> None:
    folder, file = with_tokenizer(tmp_path / "model"), tmp_path / "text.txt"
    words = ["a", "b", "c", "d", "e"] * 150
    file.write_text(" ".join(words))
    text = "lora 1 adapter default { rank = 4 init = lora_ga target q_proj }"
    lora_fx.build(text, folder, tmp_path / "out", calibration=file)
    model = lora_fx.load(tmp_path / "out", backend=None)
    ids = torch.tensor([["?", "a", "b", "c", "d", "e"].index(word) for word in words])[None]
    data = [{"input_ids": part, "labels": part} for part in (ids[:, :512], ids[:, 512:])]
    want = lora_fx.compile(llama(2), text, backend=None, calibration=data)
    for fqn, weight in weights(want).items():
        assert relative(weights(model)[fqn], weight) < 1e-5
    half = lora_fx.compile(llama(2), text, backend=None, calibration=data[:1])
    assert relative(weights(half)[fqn], weight) > 1e-4
    for content, message in (("", "no text"), (None, "cannot be read")):
        file.write_text(content) if content is not None else file.unlink()
        with pytest.raises(lora_fx.LoraFxError, match=message):
            lora_fx.build(text, folder, tmp_path / "other", calibration=file)
    file.write_text("a b")
    with pytest.raises(lora_fx.LoraFxError, match="needs the model's tokenizer"):
        lora_fx.build(text, llama(2), tmp_path / "other", calibration=file)


def test_a_text_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with_tokenizer(Path("model"))
    Path("text.txt").write_text("a b c d e " * 40)
    Path("a.lora").write_text('lora 1 model "model" adapter x { init = corda target q_proj }')
    capfd.readouterr()
    line = ["compile", "a.lora", "--calibration", "text.txt", "--out", "out"]
    assert run(monkeypatch, *line) == 0
    out, err = capfd.readouterr()
    assert out.startswith("wrote out")
    assert err == ""
    assert run(monkeypatch, "compile", "a.lora", "--out", "other") == 1
    assert capfd.readouterr().err.startswith("error[calibration-data]")
    assert not Path("other").exists()
    model = lora_fx.load("out", backend=None)
    assert relative(weights(model)["model.layers.0.self_attn.q_proj"], weights_of("model")) > 0.01


def weights_of(folder: str) -> Tensor:
    base = LlamaForCausalLM.from_pretrained(folder)
    return base.model.layers[0].self_attn.q_proj.weight.detach()


def skewed() -> nn.Module:
    """A model some of whose layers have inputs of few directions."""
    base = llama(2)
    with torch.no_grad():
        base.model.embed_tokens.weight.mul_(torch.logspace(1, -1, 32))
        for layer in base.model.layers:
            layer.mlp.up_proj.weight.mul_(torch.logspace(1, -1, 44)[:, None])
            layer.self_attn.o_proj.weight.mul_(torch.logspace(0, -2, 32)[:, None])
    return base


def eva_of_peft(data: list[dict[str, Tensor]], **settings: Any) -> nn.Module:
    names = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    common: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(**settings), **common)
        model = get_peft_model(skewed(), config)
        initialize_lora_eva_weights(model, data, show_progress_bar=False)
    return model


EVA = "rank = 4 alpha = 6 init = eva{} target q_proj, k_proj, v_proj, up_proj, down_proj"


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ("", {}),
        ("(rho = 1)", {"rho": 1.0}),
        ("(tau = 0.999, whiten = true)", {"tau": 0.999, "whiten": True}),
        ("(adjust_scaling_factors = false)", {"adjust_scaling_factors": False}),
        ("(use_label_mask = false)", {"use_label_mask": False}),
        ("(label_mask_value = 7)", {"label_mask_value": 7}),
    ],
)
def test_eva_is_that_of_peft(arguments: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Ranks, scalings and rows up to their signs; PEFT's SVD is a randomised one too."""
    ids = tokens(4, 29)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :4], labels[:, 4:7], mask[1, 20:] = -100, 7, 0
    data = [{"input_ids": ids, "labels": labels, "attention_mask": mask}]
    want = eva_of_peft(data, **settings)
    model = compiled(EVA.format(arguments), skewed(), data)
    ours = {n: t for n, t in live_tensors(model, "default").items() if "lora_A" in n}
    named = {n: t.detach() for n, t in theirs(want).items() if "lora_A" in n}
    assert ours.keys() == named.keys()
    assert sum(len(t) for t in ours.values()) == 4 * 10
    assert len({len(t) for t in ours.values()}) > 1 or "rho" in arguments
    scalings = {n: s.lora_arithmetic["default"].scaling for n, s in storage.sites(model)}
    for name, A in ours.items():
        fqn = name.removesuffix(".lora_A.weight")
        own, other = A.abs(), named[name].abs()
        if "self_attn" in name:  # q, k and v share inputs: which one gets more is no matter
            assert abs(len(own) - len(other)) < 2
        else:
            assert len(own) == len(other), name
        if "self_attn" in name and "whiten" in arguments:
            continue  # PEFT divides what the three layers share three times, in place
        rows = min(len(own), len(other))
        assert relative(own[:rows], other[:rows]) < 1e-2, name
        assert relative(own[:rows].roll(1, 1), other[:rows]) > 0.1
        site = want.get_submodule(f"{PREFIX}{fqn}")
        ratio = len(other) / len(own) if "false" in arguments and "adjust" in arguments else 1
        assert scalings[fqn] == pytest.approx(site.scaling["default"] * ratio)
    assert torch.equal(logits(model), logits(skewed()))
    scatter(model)
    model.save_pretrained(tmp_path)
    again = lora_fx.load(tmp_path, skewed(), backend=None)
    assert torch.equal(logits(again), logits(model))
    assert relative(logits(model), logits(skewed())) > 1e-2


def test_eva_in_an_artifact(tmp_path: Path) -> None:
    text = f"lora 1 adapter default {{ {EVA.format('')} }}"
    plan = lora_fx.build(text, skewed(), tmp_path / "out", calibration=batches())
    model = lora_fx.compile(skewed(), text, backend=None, calibration=batches())
    again = lora_fx.load(tmp_path / "out", skewed(), backend=None)
    ranks = {site.fqn: site.rank for site in plan.sites}
    assert len(set(ranks.values())) > 1
    for one in (model, again):
        assert {site.fqn: site.rank for site in one.lora_fx_plan.sites} == ranks
        shapes = {n: len(t) for n, t in live_tensors(one, "default").items() if "lora_A" in n}
        assert list(shapes.values()) == list(ranks.values())
    assert all(
        torch.equal(t, live_tensors(again, "default")[n])
        for n, t in live_tensors(model, "default").items()
    )
    scalings = [
        [(s.lora_arithmetic["default"].scaling) for _, s in storage.sites(m)]
        for m in (model, again)
    ]
    assert scalings[0] == scalings[1]
    assert not again.lora_fx_plan.notes


def test_components_are_those_of_all_vectors() -> None:
    """Batch by batch, as of all at once; the ratios are shares of the whole variance."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(1, -2, 12)
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    parts = [torch.randn(n, 12, generator=generator) * spread @ turn + n for n in (40, 25, 61)]
    known = PrincipalComponents(12, torch.Generator().manual_seed(0))
    for part in parts:
        known.add(part)
    whole = torch.cat(parts)
    centred = whole - whole.mean(0)
    _, S, V = torch.linalg.svd(centred, full_matrices=False)
    assert relative(known.components.abs(), V.abs()) < 1e-3
    assert relative(known.singular_values, S) < 1e-4
    assert relative(known.ratios, S.square() / S.square().sum()) < 1e-4
    careless = PrincipalComponents(12, torch.Generator().manual_seed(0))
    careless.add(parts[-1])
    assert relative(careless.singular_values, S) > 0.1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch in the data"),
        ((batch for batch in batches()[:2]), "once, and `eva` needs them again"),
        ([{"input_ids": tokens(1, 5)}], "no batch has the 8 tokens"),
    ],
)
def test_data_that_eva_cannot_use(data: Any, message: str) -> None:
    with pytest.raises(lora_fx.LoraFxError, match=message):
        compiled("rank = 4 init = eva(tau = 1) target q_proj, up_proj", skewed(), data)
