"""Copies of modules, biases and token rows in a mixed batch: each sample by its adapter's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lora_fx
from lora_fx.adapters.weights import copies
from lora_fx.diagnostics import LoraFxError
from tests.dense import relative
from tests.runtime.test_combine import loaded_by_peft
from tests.runtime.test_mixed_generation import write
from tests.tiny import checkpointing, llama, tokens

SPEC = """lora 1
adapter a { rank = 4 init = random target q_proj, up_proj  train "model.norm", v_proj, lm_head }
adapter b { rank = 3 init = random bias = all  target linear }
adapter c { rank = 2 init = random target v_proj  tokens [3, 7, 50, 20] }
adapter d { rank = 2 variant = dora bias = lora_only init = random target v_proj, q_proj
            train embed_tokens, "model.layers.*.input_layernorm" }
route { train = true  when "half" -> 0.5 * a - 0.25 * b + 0.75 * c }
"""
BIASED = {"attention_bias": True, "mlp_bias": True}
NAMES = ["a", "b", "__base__", "c", "d", "a"]
IDS = tokens(6, 17)
IDS[:, 2:5] = torch.tensor([7, 3, 50])
BACKENDS = [None, "eager", "inductor"]


def mixed(backend: str | None, spec: str = SPEC, **settings: Any) -> Any:
    base = llama(2, **BIASED, **settings)
    model: Any = lora_fx.compile(base, spec, backend=backend).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "lora_own.base" not in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.set_adapter("a")
    return model


@torch.no_grad()
def alone(model: Any, name: str, row: int) -> Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(input_ids=IDS[row : row + 1]).logits[0]
    model.set_adapter(name)
    return model(input_ids=IDS[row : row + 1]).logits[0]


@torch.no_grad()
def routed(model: Any, names: list[str] = NAMES) -> Tensor:
    return model(input_ids=IDS, adapter_names=names).logits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tied", [False, True])
def test_each_sample_is_as_it_is_alone(backend: str | None, tied: bool) -> None:
    spec = SPEC.replace(", lm_head }", " }") if tied else SPEC
    model = mixed(backend, spec, tie_word_embeddings=tied)
    got = routed(model)
    for row, name in enumerate(NAMES):
        assert relative(got[row], alone(model, name, row)) < 1e-5, name
        others = (other for other in set(NAMES) if other != name)
        assert all(relative(got[row], alone(model, other, row)) > 1e-3 for other in others), name
    model.set_adapter("b")  # whose tensors are in force while others' samples run
    again = routed(model)
    assert torch.equal(again, got)
    base = routed(model, ["__base__"] * 6)
    assert torch.equal(got[2], base[2])


def test_as_peft_computes_each_adapter(tmp_path: Path) -> None:
    model = mixed(None)
    model.save_pretrained(tmp_path)
    got = routed(model)
    for row, name in ((0, "a"), (1, "b"), (3, "c")):
        theirs = loaded_by_peft(tmp_path / name, llama(2, **BIASED), name)
        with torch.no_grad():
            assert relative(got[row], theirs(input_ids=IDS[row : row + 1]).logits[0]) < 1e-5, name


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_mix_is_a_sum_of_changes(backend: str | None) -> None:
    """A float64 base with the weighted changes of all its tensors."""
    model = mixed(backend)
    got = routed(model, ["half"] * 6)

    @torch.no_grad()
    def dense(shares: dict[str, float]) -> Tensor:
        base = llama(2, **BIASED).double().eval()
        untied: dict[str, Tensor] = {}
        for name, share in shares.items():
            one = mixed(None)
            one.set_adapter(name)
            plain = one.merge_and_unload().double()
            for key, tensor in plain.state_dict().items():
                change = share * (tensor - base.state_dict()[key])
                untied[key] = untied.get(key, torch.zeros_like(tensor)) + change
        for key, tensor in base.state_dict().items():
            tensor += untied.get(key, 0)
        return base(input_ids=IDS).logits

    assert relative(got, dense({"a": 0.5, "b": -0.25, "c": 0.75})) < 1e-5
    assert relative(got, dense({"a": 0.5, "b": 0.25, "c": 0.75})) > 1e-3


def losses(logits: Tensor) -> Tensor:
    flat = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), IDS[: len(logits), 1:].flatten(), reduction="none"
    )
    return flat.sum()


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def held(model: Any) -> dict[int, str]:
    """The name of each parameter where its adapter keeps it, whatever is in force."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {id(p): name for name, p in parameters if "lora_" in name}


def by_name(model: Any) -> dict[str, Tensor]:
    names = held(model)
    return {names[id(p)]: p.grad.clone() for p in model.parameters() if p.grad is not None}


def apart(model: Any, names: list[str]) -> dict[str, Tensor]:
    model.zero_grad()
    for name in dict.fromkeys(names):
        if name != "__base__":
            rows = [row for row, one in enumerate(names) if one == name]
            model.set_adapter(name)
            logits = model(input_ids=IDS[rows]).logits
            flat = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), IDS[rows, 1:].flatten(), reduction="sum"
            )
            flat.backward()
    found = by_name(model)
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "backend", [None, "eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_gradients_are_those_of_separate_runs(backend: str | None) -> None:
    model, names = mixed(backend).train(), ["a", "b", "__base__", "c", "d", "a"]
    want = apart(model, names)
    kinds = ("lora_own.a", "lora_own.b", "lora_own.d", "lora_tokens.c", "lora_A.a")
    assert all(any(kind in name for name in want) for kind in kinds)
    losses(model(input_ids=IDS, adapter_names=names).logits).backward()
    got = by_name(model)
    for name, gradient in want.items():
        assert relative(got[name], gradient) < 3e-5, name
    assert got.keys() == want.keys()
    model.zero_grad()
    losses(model(input_ids=IDS, adapter_names=names[::-1]).logits).backward()
    assert any(relative(by_name(model)[name], want[name]) > 1e-2 for name in want)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_absent_adapters_do_not_move(backend: str | None) -> None:
    model = mixed(backend).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    for names, there in ((["a", "b", "d", "c"], "abcd"), (["a", "a", "__base__", "c"], "ac")):
        optimizer.zero_grad()
        names_of = held(model)
        before = {id(p): p.detach().clone() for p in model.parameters()}
        losses(model(input_ids=IDS[:4], adapter_names=names).logits).backward()
        optimizer.step()
        moved = {
            names_of[id(p)].split(".lora_")[1].split(".")[1]
            for p in model.parameters()
            if not torch.equal(p, before[id(p)])
        }
        assert moved == set(there)
        absent = [p for p in model.parameters() if p.requires_grad and p.grad is None]
        assert {names_of[id(p)].split(".lora_")[1].split(".")[1] for p in absent} == set(
            "abcd"
        ) - set(there)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_what_is_computed_again_is_routed_as_it_was(backend: str | None, reentrant: bool) -> None:
    model = mixed(backend).train()
    losses(model(input_ids=IDS, adapter_names=NAMES).logits).backward()
    want = by_name(model)
    model.zero_grad()
    checkpointing(model, reentrant)
    if reentrant:
        model.enable_input_require_grads()
    loss = losses(model(input_ids=IDS, adapter_names=NAMES).logits)
    routed(model.eval(), NAMES[::-1])
    model.train().set_adapter("d")
    loss.backward()
    got = by_name(model)
    for name, gradient in want.items():
        assert relative(got[name], gradient) < 3e-5, name


@pytest.mark.parametrize("backend", [None, pytest.param("inductor", marks=pytest.mark.slow)])
def test_each_sample_is_written_as_alone(backend: str | None) -> None:
    model = mixed(backend)
    got = write(model, IDS[:5, :9], adapter_names=NAMES[:5], num_beams=2)
    for row, name in enumerate(NAMES[:5]):
        model.set_adapter([] if name == "__base__" else name)
        assert torch.equal(got[row], write(model, IDS[row : row + 1, :9], num_beams=2)[0]), name


def test_other_mixes_compile_nothing() -> None:
    model = mixed("eager")
    routed(model)
    counters.clear()
    for names in (["b"] * 6, ["half", "c", "d", "__base__", "a", "b"], NAMES[::-1]):
        routed(model, names)
        model.set_adapter(names[1])
    assert counters["stats"]["unique_graphs"] == 0
    assert not counters["recompiles"]


def test_an_error_inside_leaves_the_active_adapter_in_force() -> None:
    model = mixed(None)
    model.set_adapter("a")
    before = model(input_ids=IDS).logits

    def fails(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = model.model.layers[1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        routed(model)
    hook.remove()
    assert model.lm_head.weight is copies.tensors(model.lm_head, "a")["weight"]
    assert torch.equal(model(input_ids=IDS).logits, before)


class Images(nn.Module):
    """A convolution, a batch norm and an encoder layer of torch, which skips what is inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.norm(self.conv(x)).mT))


@pytest.mark.parametrize("backend", [None, "eager"])
def test_any_module(backend: str | None) -> None:
    torch.manual_seed(0)
    base = Images().eval()
    base.norm.running_mean.normal_()
    spec = """lora 1
adapter a { rank = 2 target head  train "layer.norm1", conv, norm }
adapter b { rank = 2 bias = lora_only target conv, head, "layer.linear1" }
adapter c { rank = 2 target head  train "layer.linear2" }"""
    model: Any = lora_fx.compile(base, spec, backend=backend).eval()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ("lora_own" in name and "base" not in name) or "lora_B" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    x, names = torch.randn(4, 3, 7), ["b", "a", "__base__", "c"]
    with torch.no_grad():
        got = model(x, adapter_names=names)
        for row, name in enumerate(names):
            if name == "__base__":
                assert relative(got[row], base(x)[row]) < 1e-6
                continue
            model.set_adapter(name)
            assert relative(got[row], model(x)[row]) < 1e-5, name
            assert relative(got[row], base(x)[row]) > 1e-2


def test_what_cannot_differ_is_refused() -> None:
    spec = """lora 1
adapter a { rank = 2 target head  train norm }
adapter b { rank = 2 target head }
route { train = true }"""
    model: Any = lora_fx.compile(Images(), spec, backend=None).train()
    with pytest.raises(LoraFxError, match=r"trains `norm`, which mixes the samples of a batch"):
        model(torch.randn(2, 3, 7), adapter_names=["a", "b"])
    whole = spec.replace("train norm", 'train "layer.self_attn"')
    with pytest.raises(LoraFxError, match=r"tensors of its own and modules inside it"):
        lora_fx.compile(Images(), whole, backend=None)
