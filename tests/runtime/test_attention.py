"""Adapters on `nn.MultiheadAttention` in whole models: trained, merged, mixed, combined, saved."""

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import SiglipVisionModel

import lora_fx
from lora_fx.adapters.peft.keys import live_tensors
from tests.adapters.attention import dense
from tests.dense import relative
from tests.runtime.attending import images, pooled, siglip, vit

HEAD = 'init = random  rank = 3  alpha = 6  target "head.attention", q_proj'
SPEC = f"lora 1 adapter a {{ {HEAD} }}"
TWO = f"{SPEC} adapter b {{ seed = 1  {HEAD} }}"
OF_VIT = "init = random  rank = 3  alpha = 6  target self_attn, linear1"
VIT = f"lora 1 adapter a {{ {OF_VIT} }} adapter b {{ seed = 1  {OF_VIT} }}"
PREFIX = "base_model.model."


def compiled(base: nn.Module, text: str, backend: str | None = None) -> Any:
    return lora_fx.compile(base, text, backend=backend)


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_vision_transformer(backend: str | None, batch_first: bool) -> None:
    """In training, in evaluation and without gradients, where torch has a kernel of its own."""
    base = vit(batch_first=batch_first)
    model = compiled(base, VIT, backend)
    want = dense(model, base)(images().double())
    assert relative(model(images()), want) < 1e-5
    with torch.no_grad():
        assert relative(model(images()), want) < 1e-5
        assert relative(base(images()), want) > 1e-2
    model.train().zero_grad()
    output = model(images())
    assert relative(output, want) < 1e-5
    output.square().sum().backward()
    twin = dense(model, base).requires_grad_()
    twin(images().double()).square().sum().backward()
    for name, site in lora_fx_sites(model):
        if "a" in site.lora_branches:
            A, B = site.lora_branches["a"].A.weight, site.lora_branches["a"].B.weight
            dW = twin.get_parameter(name if "_weight" in name else f"{name}.weight").grad
            assert dW is not None
            assert relative(A.grad, 2 * B.double().T @ dW) < 1e-4, name  # type: ignore[arg-type]
            assert relative(B.grad, 2 * dW @ A.double().T) < 1e-4, name  # type: ignore[arg-type]
    with torch.no_grad(), model.eval().disable_adapter():
        assert relative(model(images()), base(images())) < 1e-6


def lora_fx_sites(model: nn.Module) -> list[tuple[str, Any]]:
    from lora_fx.adapters import storage

    return list(storage.sites(model))


class Translator(nn.Module):
    """An encoder and a decoder, which attends to what the encoder has found."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Transformer(12, 2, 2, 2, 20, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        causal = self.both.generate_square_subsequent_mask(target.shape[1])
        hidden: dict[str, Any] = {"src_key_padding_mask": padding}
        hidden["memory_key_padding_mask"] = padding
        return self.both(source, target, tgt_mask=causal, tgt_is_causal=True, **hidden)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_and_a_decoder(backend: str | None) -> None:
    torch.manual_seed(0)
    base = Translator().eval().requires_grad_(False)
    source, target = torch.randn(3, 7, 12), torch.randn(3, 5, 12)
    padding = torch.arange(7) >= torch.tensor([[7], [4], [6]])
    text = "lora 1 adapter a { init = random  rank = 2  target self_attn, multihead_attn }"
    model = compiled(base, text, backend)
    assert sum("multihead_attn" in name for name, _ in lora_fx_sites(model)) == 4
    want = dense(model, base)(source.double(), target.double(), padding)
    for training in (False, True):
        assert relative(model.train(training)(source, target, padding), want) < 1e-5
    with torch.no_grad():
        assert relative(model.eval()(source, target, padding), want) < 1e-5
        assert relative(base(source, target, padding), want) > 1e-2


@torch.no_grad()
def test_merged_and_unmerged() -> None:
    base = vit()
    model = compiled(base, VIT)
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    before, want = model(images()), dense(model, base)(images().double())
    model.merge_adapter()
    assert relative(model(images()), want) < 1e-5
    assert model.merged_adapters() == ["a"]
    model.set_adapter(["a", "b"])
    both = dense(model, base, "a", "b")(images().double())
    assert relative(model(images()), both) < 1e-5
    model.set_adapter("a")
    model.unmerge_adapter()
    assert torch.equal(model(images()), before)
    own = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert own[name].data_ptr() == parameter.data_ptr()
    plain = model.merge_and_unload()
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in plain.encoder.layers)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert relative(plain(images()), want) < 1e-5


def test_what_would_not_be_finite_is_not_merged() -> None:
    model = compiled(vit(), VIT)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    site = dict(lora_fx_sites(model))["encoder.layers.1.self_attn.in_proj_weight"]
    with torch.no_grad():
        site.lora_branches["a"].B.weight[3, 1] = torch.inf
    with pytest.raises(lora_fx.LoraFxError, match=r"self_attn\.in_proj_weight` would hold NaN"):
        model.merge_adapter()
    assert model.merged_adapters() == []
    for name, parameter in model.named_parameters():
        assert "lora_B" in name or torch.equal(parameter, weights[name])


def test_weights_do_not_drift() -> None:
    """PEFT makes them anew in each forward, by adding and subtracting: 0.04 off in bfloat16."""
    base = vit().bfloat16()
    model = compiled(base, VIT).train()
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    kept = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(5):
        model(images().bfloat16()).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in weights.items():
        assert torch.equal(kept[name], value)
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_mixed_batch(backend: str | None, batch_first: bool, training: bool) -> None:
    """Of which samples are dimension 1 of what torch's layers get, unless it is said otherwise."""
    base, text = vit(batch_first=batch_first), f"{VIT} route {{ default -> a  train = true }}"
    if not batch_first:
        text = text.replace(", linear1", "")  # there dimension 0 are not samples
    model = compiled(base, text, backend).train(training)
    names = ["b", "__base__", "a", "b"]
    with torch.set_grad_enabled(training):
        got = model(images(4), adapter_names=names)
    for i, name in enumerate(names):
        twin = base if name == "__base__" else dense(model, base, name)
        parameter = next(twin.parameters())
        want = twin(images(4).to(parameter.dtype))[i]
        assert relative(got[i], want) < 1e-5
        assert relative(got[i], got[(i + 1) % 4]) > 1e-2
    if training:
        got.square().sum().backward()
        for name in ("a", "b"):
            live = live_tensors(model, name)
            assert all(t.grad is not None and t.grad.norm() > 0 for t in live.values())


@torch.no_grad()
def test_a_mixed_batch_of_transformers_own_model() -> None:
    base = siglip()
    model = compiled(base, f"{TWO} route {{ default -> a }}")
    got = pooled(model, adapter_names=["b", "__base__", "a"])
    assert relative(got[1], pooled(base)[1]) < 1e-6
    for i, name in ((0, "b"), (2, "a")):
        want = dense(model, base, name)(pixel_values=images().double()).pooler_output[i]
        assert relative(got[i], want) < 1e-5
        assert relative(pooled(base)[i], want) > 1e-2


def test_a_batch_of_several_needs_a_dimension_for_it() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.attn(one, one, one)[0] for one in x])

    text = "lora 1 adapter a { init = random  rank = 2  target attn } route { default -> a }"
    model = compiled(Single(), text).eval()
    with pytest.raises(lora_fx.LoraFxError, match="one sample without a batch"):
        model(torch.randn(2, 5, 6), adapter_names=["a", "__base__"])
    x = torch.randn(1, 5, 6)
    alone = model(x)
    assert relative(model(x, adapter_names=["a"]), alone) < 1e-6
    with model.disable_adapter():
        assert relative(model(x), alone) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_adapters_are_combined(method: str) -> None:
    base = siglip()
    model = compiled(base, TWO)
    rank = {"svd_rank": 6} if method == "svd" else {}
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", method, **rank)
    model.set_adapter("new")
    twin, parts = copy.deepcopy(base).double(), {n: dense(model, base, n) for n in ("a", "b")}
    for name, parameter in twin.named_parameters():
        a, b = (parts[n].get_parameter(name) - parameter for n in ("a", "b"))
        parameter.data = parameter + 0.7 * a - 0.4 * b
    want = twin(pixel_values=images().double()).pooler_output
    assert relative(pooled(model), want) < 1e-5
    assert relative(pooled(base), want) > 1e-2


@torch.no_grad()
def test_an_adapter_is_converted() -> None:
    base = siglip()
    model = compiled(base, SPEC.replace("random", "random  variant = dora"))
    model.convert_adapter("a", "plain", 24)
    want = pooled(model)
    model.set_adapter("plain")
    assert relative(pooled(model), want) < 1e-4
    assert relative(pooled(base), want) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("rank", [2, 3])
def test_another_adapter_in_its_place(rank: int, tmp_path: Path) -> None:
    """Of a smaller rank too."""
    text = SPEC.replace("rank = 3", f"rank = {rank}  seed = 5")
    other = compiled(siglip(), text)
    other.save_pretrained(tmp_path)
    want, model = pooled(other), compiled(siglip(), SPEC)
    assert relative(pooled(model), want) > 1e-2
    parameters = [id(p) for p in model.parameters()]
    model.hotswap_adapter(tmp_path / "a", "a")
    assert relative(pooled(model), want) < 1e-6
    assert [id(p) for p in model.parameters()] == parameters


def test_status_and_plan_name_the_matrices() -> None:
    model = compiled(siglip(), SPEC)
    status = {one.name: one for one in model.get_layer_status() if one.available_adapters}
    assert list(status)[-2:] == ["head.attention.in_proj_weight", "head.attention.out_proj"]
    assert status["head.attention.in_proj_weight"].ranks == {"a": 3}
    (part,) = model.lora_fx_plan.explain("head.attention")
    names = [site.name for site, _ in part.sites]
    assert sorted(names) == ["head.attention.in_proj_weight", "head.attention.out_proj"]
    shapes = {site.name: site.tensors for site in model.lora_fx_plan.sites}
    assert shapes["head.attention.in_proj_weight"] == {
        "lora_A.weight": (3, 24),
        "lora_B.weight": (72, 3),
    }
    assert shapes["head.attention.out_proj"]["lora_B.weight"] == (24, 3)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.lora_fx_plan.trainable == trainable


def test_copied_pickled_and_moved() -> None:
    model = compiled(vit(), VIT)
    want = model(images())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in live_tensors(model, "a").values():
            tensor.zero_()
    assert torch.equal(twin(images()), want)
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(images()), want)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model(images()), want)
    assert relative(model.double()(images().double()), want) < 1e-5
    assert relative(vit()(images()), want) > 1e-2


@pytest.mark.parametrize("more", ["", "variant = dora", "init = pissa", "bias = all"])
def test_saved_and_loaded(more: str, tmp_path: Path) -> None:
    more = more if "init" in more else f"init = random  {more}"
    model = compiled(siglip(), SPEC.replace("init = random", more))
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in live_tensors(model, "a").values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    want = pooled(model)
    model.save_pretrained(tmp_path)
    again = lora_fx.load(tmp_path, base=siglip(), backend=None)
    assert relative(pooled(again), want) < (1e-5 if "pissa" in more else 1e-6)
    assert relative(pooled(siglip()), want) > 1e-2
    state, other = (m.get_adapter_state_dict("a") for m in (model, again))
    assert state.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_separate_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    """In a layout of our own: PEFT adapts no such attention."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(12, 3, kdim=10, vdim=9)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attn(q, k, v)[0]

    torch.manual_seed(0)
    base, text = Model(), "lora 1 adapter a { init = random  rank = 3  target attn }"
    x = torch.randn(4, 2, 12), torch.randn(5, 2, 10), torch.randn(5, 2, 9)
    model = compiled(base, text)
    lora_fx.build(text, base, tmp_path / "artifact")
    again = lora_fx.load(tmp_path / "artifact", base=base, backend=None)
    assert torch.equal(again(*x), model(*x))
    assert relative(base(*x), model(*x)) > 1e-2
    with pytest.raises(lora_fx.LoraFxError, match="a weight for each of q, k and v"):
        model.lora_fx_plan.to_peft()


def by_peft(**config: Any) -> Any:
    targets = ["attention", "q_proj"]
    settings = {"r": 3, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False}
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(siglip(), LoraConfig(**settings | config)).eval()


def without_twice(model: nn.Module, factor: float) -> None:
    """Scale what PEFT adds to the output projection."""
    for name, parameter in model.named_parameters():
        if "out_proj.lora_B" in name and "attention" in name:
            parameter.data *= factor


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"bias": "all"}])
def test_files_of_peft(config: dict[str, Any], tmp_path: Path) -> None:
    """PEFT adds the output projection's twice: with half of it, what it computes is right."""
    theirs = by_peft(**config)
    theirs.save_pretrained(tmp_path)
    without_twice(theirs, 0.5)
    want = pooled(theirs)
    ours = lora_fx.load(tmp_path, base=siglip(), backend=None)
    assert relative(pooled(ours), want) < 1e-5
    assert relative(pooled(siglip()), want) > 1e-2
    without_twice(theirs, 2)
    assert relative(pooled(theirs), pooled(ours)) > 1e-2
    saved = ours.get_adapter_state_dict("default")
    wanted = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("more", ["", "scaling = rslora", "bias = all", "bias = lora_only"])
def test_files_for_peft(more: str, tmp_path: Path) -> None:
    text = SPEC.replace("adapter a", "adapter default").replace("rank", f"{more}  rank")
    ours = compiled(siglip(), text)
    with torch.no_grad():
        for tensor in live_tensors(ours, "default").values():
            tensor.add_(0.1 * torch.ones_like(tensor))
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        theirs = PeftModel.from_pretrained(siglip(), tmp_path).eval()
    wanted = get_peft_model_state_dict(theirs)
    saved = ours.get_adapter_state_dict("default")
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in saved.items())
    without_twice(theirs, 0.5)
    assert relative(pooled(theirs), pooled(ours)) < 1e-5


def test_gradients_of_peft_where_they_are_right() -> None:
    """Of all but the output projection, of which it has half of what it computes."""
    theirs = by_peft().train()
    ours = compiled(siglip(), SPEC.replace("adapter a", "adapter default")).train()
    state = get_peft_model_state_dict(theirs)
    for name, tensor in live_tensors(ours, "default").items():
        tensor.data.copy_(state[f"{PREFIX}{name}"])
    without_twice(theirs, 0.5)
    for model in (ours, theirs):
        pooled(model).square().sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    compared = 0
    for name, tensor in live_tensors(ours, "default").items():
        there = grads[f"{PREFIX}{name}".replace(".weight", ".default.weight")]
        if "out_proj" not in name:
            assert relative(tensor.grad, there) < 1e-5  # type: ignore[arg-type]
            compared += 1
    assert compared == 6


def test_weights_that_peft_trained_are_read_as_it_computes_them(tmp_path: Path) -> None:
    """`doubled_out_proj`: and saved as what that is."""
    theirs = by_peft()
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "a.lora").write_text(
        'lora 1 adapter a { weights = "theirs"  doubled_out_proj = true }'
    )
    ours = lora_fx.compile(siglip(), tmp_path / "a.lora", backend=None)
    assert relative(pooled(ours), pooled(theirs)) < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    again = lora_fx.load(tmp_path / "ours", base=siglip(), backend=None)
    assert torch.equal(pooled(again), pooled(ours))
    (tmp_path / "a.lora").write_text('lora 1 adapter a { weights = "theirs" }')
    plain = lora_fx.compile(siglip(), tmp_path / "a.lora", backend=None)
    assert relative(pooled(plain), pooled(theirs)) > 1e-2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "adapter a { doubled_out_proj = true  rank = 2  target attention }",
            "`doubled_out_proj` is about weights that PEFT has trained",
        ),
        (
            "adapter a { rank = 2  target attention { doubled_out_proj = true } }",
            "`doubled_out_proj` has one value for the whole adapter",
        ),
        (
            'adapter a { rank = 2  target attention  train "head.attention.out_proj" }',
            "`head.attention.out_proj` in it is trained as a whole",
        ),
        (
            'adapter a { rank = 2  target attention, parameter "head.attention.in_proj_weight" }',
            "`head.attention` is adapted as a module already",
        ),
        (
            "adapter a { rank = 2  target attention } adapter b { rank = 2  "
            'target parameter "head.attention.out_proj.weight" }',
            "is adapted as a module and as a parameter",
        ),
        (
            'adapter a { rank = 2  target "head.attention.out_proj" }',
            "modules are never called",
        ),
        (
            "adapter a { rank = 2  lora_bias = true  target attention }",
            "`nn.MultiheadAttention` has no `lora_bias`",
        ),
        (
            "adapter a { rank = 2  variant = kasa  target attention }",
            "`nn.MultiheadAttention` has no variant `kasa`",
        ),
        (
            "adapter a { rank = 2  init = eva  target attention }",
            "`nn.MultiheadAttention` has no init `eva`",
        ),
        ("adapter a { rank = 25  target attention }", "rank 25 is larger than the layer allows"),
    ],
)
def test_what_does_not_go_is_refused_at_its_line(text: str, message: str) -> None:
    with pytest.raises(lora_fx.LoraFxError) as raised:
        compiled(siglip(), f"lora 1\n{text}")
    (first, *_) = raised.value.diagnostics
    assert message in first.message
    assert first.span is not None
    assert first.span.line == 2


def test_dropout_of_peft_is_none_at_an_attention() -> None:
    spec = lora_fx.from_peft(by_peft(lora_dropout=0.3).peft_config["default"], siglip())
    dropout = {site.name: site.dropout for site in lora_fx.plan(spec, siglip()).sites}
    assert dropout["head.attention.in_proj_weight"] == dropout["head.attention.out_proj"] == 0
    assert dropout["encoder.layers.0.self_attn.q_proj"] == 0.3
    (config,) = lora_fx.plan(spec, siglip()).to_peft().values()
    assert config["lora_dropout"] == 0.3
    text = f"lora 1 adapter a {{ dropout = 30%  {HEAD} }}"
    with pytest.raises(lora_fx.LoraFxError, match="PEFT has no dropout at"):
        lora_fx.plan(text, siglip()).to_peft()


def test_an_artifact(tmp_path: Path) -> None:
    base = siglip()
    lora_fx.build(SPEC.replace("random", "pissa"), base, tmp_path / "artifact")
    model = lora_fx.load(tmp_path / "artifact", base=siglip(), backend=None)
    fresh = compiled(siglip(), SPEC.replace("random", "pissa"))
    assert relative(pooled(model), pooled(base)) < 1e-5
    for name, tensor in live_tensors(fresh, "a").items():
        assert torch.equal(live_tensors(model, "a")[name], tensor)


def test_merged_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = siglip()
    base.save_pretrained("base", max_shard_size="20KB")
    model = compiled(base, SPEC)
    model.save_pretrained(".")
    Path("a.lora").write_text(
        'lora 1 model "base" adapter a { weights = "a" } '
        'merge all { from a  into = base  save = "out" }'
    )
    lora_fx.merge("a.lora")
    merged = SiglipVisionModel.from_pretrained("out").eval()
    assert relative(pooled(merged), pooled(model)) < 1e-5
    assert relative(pooled(base), pooled(model)) > 1e-2
    changed = {
        name
        for name, p in merged.named_parameters()
        if not torch.equal(p, base.get_parameter(name))
    }
    assert {name for name in changed if "head" in name} == {
        "head.attention.in_proj_weight",
        "head.attention.out_proj.weight",
    }
