"""Adapters on `nn.MultiheadAttention` beside torch's own with W + s B A, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters import storage
from tests.adapters.attention import (
    HEADS,
    MASKS,
    MODULES,
    SPEC,
    E,
    L,
    N,
    S,
    attending,
    compiled,
    dense,
    inputs,
    masks,
    some,
)
from tests.dense import relative

FLOAT64 = 1e-13


def assert_same(got: Any, want: Any, base: Any = None) -> None:
    (output, weights), (wanted, wanted_weights) = got, want
    assert output.shape == wanted.shape
    assert relative(output, wanted) < FLOAT64
    assert (weights is None) == (wanted_weights is None)
    if weights is not None:
        assert weights.shape == wanted_weights.shape
        assert relative(weights, wanted_weights) < FLOAT64
    if base is not None:
        assert relative(base[0], wanted) > 1e-2


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", ["same", "memory", "different", "unbatched"])
@pytest.mark.parametrize("training", [False, True])
def test_every_module_and_input(module: str, kind: str, training: bool) -> None:
    base = attending(**MODULES[module])
    model = compiled(base).train(training)
    given = inputs(base.attn, kind)
    for need_weights, average in ((False, True), (True, True), (True, False)):
        how = {"need_weights": need_weights, "average_attn_weights": average}
        want = dense(model, base).train(training)(*given, **how)
        assert_same(model(*given, **how), want, base(*given, **how))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("module", ["plain", "batch first", "own keys", "separate"])
@pytest.mark.parametrize("kind", ["memory", "unbatched"])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_every_mask(mask: str, module: str, kind: str) -> None:
    base = attending(**MODULES[module])
    model, given = compiled(base), inputs(base.attn, kind)
    how = masks(mask, S, kind != "unbatched")
    for need_weights in (False, True):
        want = dense(model, base)(*given, need_weights=need_weights, **how)
        plain = dense(model, base)(*given, need_weights=need_weights)
        assert_same(model(*given, need_weights=need_weights, **how), want)
        assert mask == "none" or relative(plain[0], want[0]) > 1e-2


@pytest.mark.parametrize("module", ["plain", "batch first"])
@torch.no_grad()
def test_torch_s_kernel_passes_no_adapter_by(module: str) -> None:
    """In evaluation, without gradients, torch's own forward is one kernel."""
    base = attending(torch.float32, **MODULES[module])
    x = inputs(base.attn, "same", dtype=torch.float32)
    model = compiled(base)
    assert relative(model(*x)[0], dense(model, base)(*(t.double() for t in x))[0]) < 1e-6
    with model.disable_adapter():
        assert torch.equal(model(*x)[0], base(*x)[0])
    assert relative(base(*x)[0], model(*x)[0]) > 1e-2


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_of_the_attention_itself(need_weights: bool) -> None:
    """Of the same random numbers."""
    base = attending(dropout=0.3, batch_first=True)
    model, given = compiled(base).train(), inputs(base.attn)
    torch.manual_seed(7)
    got = model(*given, need_weights=need_weights)
    torch.manual_seed(7)
    assert_same(got, dense(model, base).train()(*given, need_weights=need_weights))
    without = dense(model, base).eval()(*given, need_weights=need_weights)
    assert relative(got[0], without[0]) > 1e-2


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", ["same", "different"])
def test_gradients_are_those_of_the_dense_weights(module: str, kind: str) -> None:
    """dA = s Bᵀ dW, dB = s dW Aᵀ, and those of the inputs."""
    base = attending(**MODULES[module])
    model, twin = compiled(base).train(), None
    given = [x.requires_grad_() for x in inputs(base.attn, kind)]
    weight = some(*model(*given)[0].shape, seed=9)
    (model(*given)[0] * weight).sum().backward()
    got = [x.grad for x in given]
    for x in given:
        x.grad = None
    twin = dense(model, base).train().requires_grad_()
    (twin(*given)[0] * weight).sum().backward()
    for one, x in zip(got, given, strict=True):
        assert one is not None
        assert x.grad is not None
        assert relative(one, x.grad) < FLOAT64
    for name, site in storage.sites(model):
        parameter = site.lora_place[1]
        fqn = name if parameter == "weight" else "attn"
        dW = twin.get_submodule(fqn).get_parameter(parameter).grad
        A, B = (f.weight for f in (site.lora_branches["a"].A, site.lora_branches["a"].B))
        s = site.lora_arithmetic["a"].scaling
        assert dW is not None
        assert A.grad is not None
        assert B.grad is not None
        assert relative(A.grad, s * B.double().T @ dW) < 1e-6
        assert relative(B.grad, s * dW @ A.double().T) < 1e-6
        assert not site.weight.requires_grad


def test_gradients_by_finite_differences() -> None:
    base = attending(add_bias_kv=True)
    model = compiled(base)
    model.double()
    given = inputs(base.attn)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4

    def output(*values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, parameters, tuple(given))[0]

    values = tuple(model.get_parameter(name).detach().requires_grad_() for name in names)
    assert all(value.dtype == torch.float64 for value in values)
    assert torch.autograd.gradcheck(output, values)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("module", ["plain", "separate", "own keys"])
def test_compiled_as_marked(backend: str, module: str) -> None:
    base = attending(torch.float32, **MODULES[module])
    marked, model = compiled(base).train(), compiled(base, backend=backend).train()
    model.load_state_dict(marked.state_dict())
    for kind in ("same", "memory", "different"):
        given = inputs(base.attn, kind, dtype=torch.float32)
        results = []
        for one in (marked, model):
            one.zero_grad()
            output = one(*given, need_weights=False)[0]
            output.square().sum().backward()
            grads = [p.grad for p in one.parameters() if p.requires_grad]
            results.append([output, *grads])
        assert len(results[0]) == 1 + 2 * (4 if module == "separate" else 2)
        for got, want in zip(*results, strict=True):
            assert relative(got, want) < 1e-5
        assert relative(base(*given)[0], results[0][0]) > 1e-2


def test_what_is_wrong_with_inputs_is_said() -> None:
    base = attending()
    model, given = compiled(base), inputs(base.attn)
    with pytest.raises(RuntimeError, match=rf"is \({S}, {N}\), and \({N}, {S}\) is needed"):
        model(*given, key_padding_mask=torch.zeros(S, N, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=rf"\({L}, {S}\) or \({N * HEADS}, {L}, {S}\)"):
        model(*given, attn_mask=torch.zeros(S, L))
    with pytest.raises(RuntimeError, match="about an `attn_mask`, and none is given"):
        model(*given, is_causal=True)
    with pytest.raises(RuntimeError, match="int64 is neither of bool nor of floats"):
        model(*given, attn_mask=torch.zeros(L, S, dtype=torch.int64))
    assert_same(model(*given), dense(model, base)(*given))


def test_several_adapters_add_up() -> None:
    base = attending()
    model = compiled(base, f"{SPEC} {SPEC.removeprefix('lora 1').replace(' a ', ' b ')}")
    given = inputs(base.attn)
    model.set_adapter(["a", "b"])
    assert_same(model(*given), dense(model, base, "a", "b")(*given))
    model.set_adapter("b")
    assert_same(model(*given), dense(model, base, "b")(*given))
    assert relative(model(*given)[0], dense(model, base, "a")(*given)[0]) > 1e-2


def moved(model: nn.Module) -> nn.Module:
    """With every trained tensor away from where it starts."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("module", ["plain", "separate"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_every_init(init: str, module: str, variant: str) -> None:
    """It starts as the base, whose weight some change, and goes its own way."""
    base = attending(**MODULES[module])
    text = SPEC.replace("rank = 3", "rank = 4  scaling = rslora")
    text = text.replace("init = random", f"init = {init}  variant = {variant}")
    model, given = compiled(base, text), inputs(base.attn)
    changed = init in ("pissa", "olora")
    exact = init in ("default", "gaussian") and variant == "lora"
    near = FLOAT64 if exact else 1e-6  # of what is kept in float32
    assert relative(model(*given)[0], base(*given)[0]) < near
    assert all((site.lora_change is not None) == changed for _, site in storage.sites(model))
    moved(model)
    with model.disable_adapter():
        assert relative(model(*given)[0], base(*given)[0]) < near
    want = dense(model, base)(*given)[0]
    assert relative(model(*given)[0], want) < 1e-6
    assert relative(base(*given)[0], want) > 1e-2
    if changed:
        A = dict(storage.sites(model))["attn.out_proj"].lora_change
        assert A is not None
        assert relative(model.attn.out_proj.weight, base.attn.out_proj.weight) > 1e-2
    before = model(*given)[0]
    model.merge_adapter()
    assert relative(model(*given)[0], want) < 1e-6
    model.unmerge_adapter()
    assert torch.equal(model(*given)[0], before)
    model.unload()
    assert type(model.attn) is nn.MultiheadAttention
    assert relative(model(*given)[0], base(*given)[0]) < near


def test_pissa_starts_with_the_best_of_each_weight() -> None:
    base = attending()
    model = compiled(base, SPEC.replace("random", "pissa"))
    for name, weight in (("in_proj_weight", base.attn.in_proj_weight), ("out_proj", None)):
        site = dict(storage.sites(model))[f"attn.{name}"]
        U, values, V = torch.linalg.svd(base.attn.out_proj.weight if weight is None else weight)
        best = U[:, :3] @ values[:3].diag() @ V[:3]
        A, B = (f.weight.double() for f in (site.lora_branches["a"].A, site.lora_branches["a"].B))
        assert relative(site.lora_arithmetic["a"].scaling * B @ A, best) < 1e-6


def test_gradients_of_dora_are_those_of_weights_with_constant_norms() -> None:
    base = attending()
    model = moved(compiled(base, SPEC.replace("random", "random  variant = dora")))
    given, weights = inputs(base.attn), {}
    leaves = {n: p.detach().double().requires_grad_() for n, p in trained(model).items()}
    for name, place in (
        ("attn.lora_parameters.in_proj_weight", "attn.in_proj_weight"),
        ("attn.out_proj", "attn.out_proj.weight"),
    ):
        A, B, m = (leaves[f"{name}.lora_{n}.a.weight"] for n in ("A", "B", "magnitude_vector"))
        W = base.get_parameter(place) + 2 * B @ A
        weights[place] = (m / W.detach().norm(dim=1))[:, None] * W
    direction = some(L, N, E, seed=9)
    want = torch.func.functional_call(base, weights, tuple(given))[0]
    (want * direction).sum().backward()
    got = model(*given)[0]
    (got * direction).sum().backward()
    assert relative(got, want) < 1e-6
    for name, parameter in trained(model).items():
        assert parameter.grad is not None
        assert leaves[name].grad is not None
        assert relative(parameter.grad, leaves[name].grad) < 1e-5, name  # type: ignore[arg-type]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", [None, "eager"])
def test_dropout_is_of_what_each_projection_gets(backend: str | None) -> None:
    """Of the branches alone: W x stays whole."""
    base = attending(torch.float32, batch_first=True)
    model = compiled(base, SPEC.replace("random", "random  dropout = 40%"), backend).train()
    (x, *_) = given = inputs(base.attn, "same", dtype=torch.float32)
    sites = dict(storage.sites(model))
    torch.manual_seed(5)
    got = model(*given, need_weights=False)[0]
    torch.manual_seed(5)
    qkv = _with_dropout(sites["attn.in_proj_weight"], x, base.attn.in_proj_bias)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out = sites["attn.out_proj"]
    want = _with_dropout(out, attended.transpose(1, 2).flatten(2), base.attn.out_proj.bias)
    assert relative(got, want) < 1e-5
    evaluated = model.eval()(*given, need_weights=False)[0]
    assert relative(evaluated, dense(model, base)(*(t.double() for t in given))[0]) < 1e-5
    assert relative(got, evaluated) > 1e-2


def _with_dropout(site: Any, x: Tensor, bias: Tensor) -> Tensor:
    A, B = (f.weight for f in (site.lora_branches["a"].A, site.lora_branches["a"].B))
    dropped = torch.nn.functional.dropout(x, 0.4)
    return x @ site.weight.T + bias + 2 * (dropped @ A.T) @ B.T


def test_a_subclass_that_attends_in_its_own_way_is_refused() -> None:
    class Other(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, x, x)

    model = nn.ModuleDict({"attn": Other(E, HEADS)})
    with pytest.raises(lora_fx.LoraFxError, match="`Other` modules cannot be adapted"):
        compiled(model)
