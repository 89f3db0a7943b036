"""`offload = true`: what an adapter starts as is computed on the accelerator, if there is one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.weights import changed_weight
from lora_fx.adapters.weights.changed_weight import original
from tests.adapters.kinds import scatter
from tests.dense import relative
from tests.tiny import llama, tokens

STARTS = {
    "default": "",
    "pissa": "init = pissa",
    "pissa(iterations)": "init = pissa(iterations = 4)",
    "olora": "init = olora",
    "mica": "init = mica",
    "loftq": "init = loftq(bits = 4, iterations = 2)",
    "kasa": "variant = kasa",
    "dora": "init = random variant = dora",
}
OF_DATA = {"corda": "init = corda", "lora_ga": "init = lora_ga(scale = weight_svd)"}
QUANTISED = {"dora": "init = random variant = dora", "pissa": "init = pissa variant = dora"}
ATTENTION = "target q_proj, down_proj"


def compiled(
    how: str, offload: bool, base: Any = None, quantize: bool = False, backend: Any = None
) -> Any:
    wanted = "offload = true" if offload else ""
    text = f"lora 1 adapter default {{ rank = 4 alpha = 6 {how} {wanted} {ATTENTION} }}"
    text += " quantize down_proj { method = nf4 }" if quantize else ""
    ids = tokens(3)
    data = [{"input_ids": ids, "labels": ids}] if "corda" in how or "lora_ga" in how else None
    base = llama(2) if base is None else base
    return lora_fx.compile(base, text, backend=backend, calibration=data).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


without_accelerator = pytest.mark.skipif(
    torch.accelerator.is_available(),
    reason="what is computed on an accelerator differs in rounding",
)


@without_accelerator
@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("name", [*STARTS, *OF_DATA])
def test_without_an_accelerator_nothing_differs(name: str, backend: Any) -> None:
    how = {**STARTS, **OF_DATA}[name]
    got, want = (compiled(how, offload, backend=backend) for offload in (True, False))
    assert all(site.offload for site in got.lora_fx_plan.sites)
    assert state(got).keys() == state(want).keys()
    assert all(torch.equal(tensor, state(want)[name]) for name, tensor in state(got).items())
    for model in (got, want):
        scatter(model)
    ids = tokens(2)
    assert torch.equal(got(ids).logits, want(ids).logits)
    assert relative(llama(2).eval()(ids).logits, want(ids).logits) > 1e-3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("name", ["pissa", "dora"])
def test_it_is_saved_and_peft_reads_the_folder(name: str, tmp_path: Path) -> None:
    model = compiled(STARTS[name], True)
    scatter(model)
    ids, want = tokens(2), model(tokens(2)).logits
    model.save_pretrained(tmp_path)
    assert "offload = true" in " ".join((tmp_path / "spec.lora").read_text().split())
    loaded: Any = lora_fx.load(tmp_path, llama(2), backend=None).eval()
    assert relative(loaded(ids).logits, want) < 1e-5
    theirs = PeftModel.from_pretrained(llama(2), tmp_path).eval()
    assert relative(theirs(ids).logits, want) < 1e-5
    assert relative(llama(2).eval()(ids).logits, want) > 1e-3


HEAVY = ("svd", "qr", "aten.mm", "vector_norm")


class _Devices(TorchDispatchMode):
    """Notes where factorisations, products and norms are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for word in HEAVY if isinstance(args[0], Tensor) else ():
            if word in str(func):
                self.found.add((word, args[0].device.type))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Devices]:
    """An accelerator of which there are shapes only; to mix it with the CPU is an error."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("lazy:0"))
    monkeypatch.setattr(changed_weight, "fingerprint", lambda weight: "")
    with FakeTensorMode(allow_non_fake_inputs=True), _Devices() as devices:
        yield devices


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("name", STARTS)
def test_where_it_is_computed(name: str, offload: bool, imagined: _Devices) -> None:
    wanted = "offload = true" if offload else ""
    text = f"lora 1 adapter default {{ rank = 4 {STARTS[name]} {wanted} {ATTENTION} }}"
    model = lora_fx.compile(llama(1), text, backend=None, inplace=True)
    expected = "lazy" if offload else "cpu"
    assert {device for _, device in imagined.found} == (set() if name == "default" else {expected})
    assert {tensor.device.type for tensor in state(model).values()} == {"cpu"}


def products(model: Any, fqn: str, name: str) -> list[Tensor]:
    """What does not depend on the signs of singular vectors, of which `lora_ga` mixes pairs."""
    site = model.get_submodule(fqn)
    A, B = (one.default.weight.detach() for one in (site.lora_A, site.lora_B))
    return [A.T @ A, B @ B.T] if name == "lora_ga" else [B @ A]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*STARTS, *OF_DATA])
def test_on_a_gpu(name: str) -> None:
    how = {**STARTS, **OF_DATA}[name]
    base = llama(2, hidden_size=512, intermediate_size=1536).double()
    weight = base.model.layers[0].mlp.down_proj.weight
    want = compiled(how, False, base)
    compiled(how, True, base)  # cuBLAS and cuSOLVER keep their workspaces from now on
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    compiled(how, False, base)
    assert torch.cuda.max_memory_allocated() == before
    got = compiled(how, True, base)
    used = torch.cuda.max_memory_allocated() - before
    assert used >= weight.nbytes if name != "default" else used == 0
    assert torch.cuda.memory_allocated() == before
    assert {tensor.device.type for tensor in state(got).values()} == {"cpu"}
    for fqn, site in storage.sites(want):
        if name in ("pissa", "pissa(iterations)", "olora", "loftq", *OF_DATA):
            both = (products(one, fqn, name) for one in (got, want))
            assert all(relative(a, b) < 1e-4 for a, b in zip(*both, strict=True))
        if name == "dora":
            m, n = (one.get_submodule(fqn).lora_magnitude_vector for one in (got, want))
            assert relative(m.default.weight, n.default.weight) < 1e-6
        assert relative(original(got.get_submodule(fqn)), original(site)) < 1e-2
    ids = tokens(2)
    assert relative(got(ids).logits, want(ids).logits) < (1e-2 if name == "loftq" else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", QUANTISED)
def test_on_a_gpu_of_what_is_packed(name: str) -> None:
    want, got = (compiled(QUANTISED[name], offload, None, True) for offload in (False, True))
    assert all(tensor.device.type == "cpu" for tensor in state(got).values())
    for fqn, site in storage.sites(want):
        if name == "dora":
            m = got.get_submodule(fqn).lora_magnitude_vector.default.weight
            assert relative(m, site.lora_magnitude_vector.default.weight) < 1e-5
    assert got(tokens(2)).logits.isfinite().all()
