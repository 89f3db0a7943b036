"""Inits that change the base's weight: what they take out of it, and that nothing is lost."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bitsandbytes
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.peft.keys import live_tensors
from lora_fx.adapters.weights.changed_weight import original
from tests.adapters.kinds import scatter
from tests.adapters.test_init_of_weight import PREFIX, compiled, peft, theirs
from tests.dense import relative
from tests.odd_models import Varied
from tests.quantised import nf4
from tests.tiny import assert_differ, assert_equal, llama, step, tokens

INITS = ["pissa", "pissa(iterations = 2)", "olora"]
SPEC = """rank = 4  alpha = 6  {more}
  target linear
  target down_proj {{ rank = 6 }}
  target q_proj {{ scaling = rslora }}
  init = {init}
  train "model.norm"  """
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def changed(init: str, base: nn.Module | None = None, more: str = "", **settings: Any) -> Any:
    return compiled(SPEC.format(init=init, more=more), base or llama(2), **settings)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {fqn: site.weight for fqn, site in storage.sites(model)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("init", INITS)
def test_it_starts_as_the_base_and_is_the_base_when_off(init: str, dtype: torch.dtype) -> None:
    base = llama(2).to(dtype)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = changed(init, base, "dtype = float32" if dtype is not torch.float64 else "")
    tolerance = TOLERANCE[dtype] if dtype is not torch.float64 else 1e-6
    assert relative(logits(model), logits(base)) < tolerance
    for fqn, weight in weights(model).items():
        assert relative(weight, base.get_submodule(fqn).weight) > 0.1
        assert relative(original(model.get_submodule(fqn)), before[f"{fqn}.weight"]) < tolerance
    scatter(model)
    assert relative(logits(model), logits(base)) > 10 * tolerance
    with model.disable_adapter():
        assert relative(logits(model), logits(base)) < tolerance
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_it_is_what_peft_makes(init: str, use_rslora: bool) -> None:
    """A and B up to signs: their product; and the weight that is left."""
    names = ["q_proj", "up_proj", "down_proj"]
    settings = {"use_rslora": use_rslora, "rank_pattern": {"down_proj": 7}}
    want = peft(llama(2), names, r=4, lora_alpha=6, init_lora_weights=init, **settings)
    scaling = "rslora" if use_rslora else "standard"
    text = f"rank = 4 alpha = 6 scaling = {scaling} init = {init} target {', '.join(names)}"
    model = compiled(f"{text} target down_proj {{ rank = 7 }}", llama(2))
    own, named = live_tensors(model, "default"), theirs(want)
    assert len(weights(model)) == 6
    for fqn, weight in weights(model).items():
        A, B = (f"{fqn}.lora_{x}.weight" for x in "AB")
        assert own[A].shape == named[A].shape
        assert relative(own[B] @ own[A], named[B] @ named[A]) < 1e-5
        left = want.get_submodule(f"{PREFIX}{fqn}").base_layer.weight
        assert relative(weight, left) < 1e-5
        assert relative(weight, llama(2).get_submodule(fqn).weight) > 0.1


def test_a_randomised_svd_comes_near_the_whole_one() -> None:
    exact = compiled("rank = 4 init = pissa target up_proj", llama(1))
    found = compiled("rank = 4 init = pissa(iterations = 300) target up_proj", llama(1))
    rough = compiled("rank = 4 init = pissa(iterations = 1) target up_proj", llama(1))
    (want,), (near,), (far,) = (weights(m).values() for m in (exact, found, rough))
    assert relative(near, want) < 1e-4
    assert relative(far, want) > 1e-2
    again = compiled("rank = 4 init = pissa(iterations = 1) target up_proj", llama(1))
    other = compiled("rank = 4 seed = 1 init = pissa(iterations = 1) target up_proj", llama(1))
    assert torch.equal(*weights(again).values(), far)
    assert not torch.equal(*weights(other).values(), far)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_transposed_weight(init: str) -> None:
    ids = torch.tensor([[0, 3, 5, 7], [1, 3, 10, 0]])
    base = Varied().eval()
    model = compiled(f"rank = 3 alpha = 5 init = {init} target mix, up", base)
    assert relative(model(ids), base(ids)) < 1e-6
    assert relative(model.mix.weight, base.mix.weight) > 0.1
    scatter(model)
    assert relative(model(ids), base(ids)) > 1e-2
    with model.disable_adapter():
        assert relative(model(ids), base(ids)) < 1e-6
    if init == "pissa":
        named = peft(Varied(), ["mix"], r=3, lora_alpha=5, init_lora_weights=init)
        left = named.get_submodule(f"{PREFIX}mix").base_layer.weight
        assert relative(model.mix.weight, left) < 1e-5


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_and_marked_are_the_same(backend: str) -> None:
    marked = changed("pissa", llama(3))
    text = SPEC.format(init="pissa", more="")
    other = lora_fx.compile(llama(3), f"lora 1 adapter default {{ {text} }}", backend=backend)
    for model in (marked, other):
        scatter(model)
    ids = tokens()
    assert_equal(step(other, ids), step(marked, ids))
    trained = set(step(marked, ids)) - {"loss"}
    assert trained == {n for n, p in marked.named_parameters() if p.requires_grad}
    assert not any("lora_start" in name for name in trained)
    with marked.disable_adapter(), other.disable_adapter():
        assert relative(logits(other), logits(marked)) < 1e-5
    assert_differ([logits(llama(3))], [logits(other)])


def test_gradients_are_those_of_the_dense_weight() -> None:
    """In float64, by finite differences."""
    model = compiled("rank = 2 alpha = 3 init = pissa target up", Varied().double().eval())
    for tensor in live_tensors(model, "default").values():
        tensor.data = tensor.data.double()
    scatter(model)
    ids = torch.tensor([[0, 3, 5, 7], [1, 3, 10, 0]])
    A, B = live_tensors(model, "default").values()

    def loss(A: Tensor, B: Tensor) -> Tensor:
        named = {"up.lora_A.default.weight": A, "up.lora_B.default.weight": B}
        return torch.func.functional_call(model, named, (ids,)).square().mean()

    assert torch.autograd.gradcheck(loss, (A, B), atol=1e-8)


TWO = """lora 1
adapter one { rank = 4 alpha = 6 init = INIT target q_proj, up_proj }
adapter two { rank = 3 alpha = 5 init = random target q_proj, down_proj }
"""


@pytest.mark.parametrize("init", INITS)
def test_another_adapter_sees_the_original(init: str) -> None:
    """With the first off, alone or beside it; PEFT's second adapter stands on what is left."""
    base = llama(2)
    model = lora_fx.compile(base, TWO.replace("INIT", init), backend=None)
    alone = TWO.replace("init = INIT target q_proj, up_proj", "target o_proj")
    want = lora_fx.compile(base, alone, backend=None)
    want.set_adapter("two")
    model.set_adapter("two")
    assert relative(logits(model), logits(want)) < 2e-6
    assert relative(logits(model), logits(base)) > 1e-2
    model.set_adapter(["one", "two"])  # the first has not moved yet
    assert relative(logits(model), logits(want)) < 2e-6
    model.delete_adapter("one")
    assert not any("lora_start" in name for name, _ in model.named_modules())
    assert relative(logits(model), logits(want)) < 2e-6
    for fqn, weight in weights(model).items():
        assert relative(weight, base.get_submodule(fqn).weight) < 2e-7


def test_a_copy_and_a_cast_keep_it() -> None:
    model = changed("pissa", llama(2))
    scatter(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.data_ptr() != other.data_ptr()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert relative(logits(half), logits(model)) < 5e-2
    with half.disable_adapter():
        assert relative(logits(half), logits(llama(2))) < 5e-2
        assert relative(logits(half), logits(model)) > 0.1


def test_in_place() -> None:
    base, given = llama(2), llama(2)
    kept = {name: p for name, p in base.named_parameters()}
    model = changed("pissa", base, inplace=True)
    assert model is base
    assert relative(logits(model), logits(given)) < 2e-6
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(kept[name], given.get_parameter(name))


def test_with_room_beside_the_weights() -> None:
    text = SPEC.format(init="pissa", more="")
    model = lora_fx.compile(
        llama(2), f"lora 1 adapter default {{ {text} }} compile {{ layout = augmented }}"
    )
    want = changed("pissa", llama(2))
    for one in (model, want):
        scatter(one)
    assert_equal(step(model, tokens()), step(want, tokens()))


def saved(init: str, folder: Path, more: str = "") -> Any:
    model = changed(init, more=more)
    scatter(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("init", INITS)
def test_a_folder_comes_back_exactly(init: str, tmp_path: Path) -> None:
    model = saved(init, tmp_path)
    again = lora_fx.load(tmp_path, llama(2), backend=None, is_trainable=True)
    for name, tensor in live_tensors(model, "default").items():
        assert torch.equal(live_tensors(again, "default")[name], tensor), name
    for fqn, weight in weights(model).items():
        assert torch.equal(weights(again)[fqn], weight)
    assert torch.equal(logits(again), logits(model))
    assert_equal(step(again, tokens()), step(model, tokens()), 0)
    with again.disable_adapter():
        assert relative(logits(again), logits(llama(2))) < 2e-6
    again.save_pretrained(tmp_path / "again")
    third = lora_fx.load(tmp_path / "again", llama(2), backend=None)
    assert torch.equal(logits(third), logits(model))


@pytest.mark.parametrize("init", INITS)
def test_peft_reads_it_as_plain_lora(init: str, tmp_path: Path) -> None:
    """Over the original base, with the trained norm, ranks and scalings by module."""
    model = saved(init, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        want = PeftModel.from_pretrained(llama(2), tmp_path).eval()
    assert want.peft_config["default"].init_lora_weights is True
    assert relative(logits(want), logits(model)) < 1e-5
    assert relative(logits(want), logits(llama(2))) > 1e-2
    with want.disable_adapter():
        assert torch.equal(logits(want), logits(llama(2)))


def test_a_rank_of_which_twice_is_more_than_the_layer_has(tmp_path: Path) -> None:
    model = compiled("rank = 20 alpha = 6 init = pissa target up_proj", llama(2))
    scatter(model)
    model.save_pretrained(tmp_path)
    again = lora_fx.load(tmp_path, llama(2), backend=None)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_folder_of_peft(init: str, tmp_path: Path) -> None:
    """It holds A and B; what they left of the weight is computed again."""
    want = peft(llama(2), init_lora_weights=init, use_rslora=True).eval()
    for name, parameter in want.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    want.save_pretrained(tmp_path)
    model = lora_fx.load(tmp_path, llama(2), backend=None)
    assert relative(logits(model), logits(want)) < 1e-5
    assert relative(logits(model), logits(llama(2))) > 1e-2
    model.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(llama(2), tmp_path / "again").eval()
    assert relative(logits(again), logits(want)) < 1e-5


def test_what_peft_drew_is_lost(tmp_path: Path) -> None:
    peft(llama(2), init_lora_weights="pissa_niter_3").save_pretrained(tmp_path)
    with pytest.raises(lora_fx.LoraFxError, match="adapter-lost-start"):
        lora_fx.load(tmp_path, llama(2), backend=None)


def test_a_wrong_base_is_refused(tmp_path: Path) -> None:
    saved("pissa", tmp_path)
    other = llama(2)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    with pytest.raises(lora_fx.LoraFxError, match=r"layers\.1\.mlp\.up_proj.*is another"):
        lora_fx.load(tmp_path, other, backend=None)
    with pytest.raises(lora_fx.LoraFxError, match="bfloat16 here, and was float32"):
        lora_fx.load(tmp_path, llama(2).bfloat16(), backend=None)


def test_an_artifact_comes_back_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama(2)
    text = f"lora 1 adapter default {{ {SPEC.format(init='pissa(iterations = 2)', more='')} }}"
    model = lora_fx.compile(base, text, backend=None)
    lora_fx.build(text, base, tmp_path / "artifact")

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("decomposed again")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    again = lora_fx.load(tmp_path / "artifact", llama(2), backend=None)
    for fqn, weight in weights(model).items():
        assert torch.equal(weights(again)[fqn], weight)
    assert torch.equal(logits(again), logits(model))
    assert relative(weights(again)[fqn], llama(2).get_submodule(fqn).weight) > 0.1
    other = llama(2)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.001)
    with pytest.raises(lora_fx.LoraFxError, match="adapter-other-base"):
        lora_fx.load(tmp_path / "artifact", other, backend=None)


def test_values_into_an_adapter_that_is_there(tmp_path: Path) -> None:
    """Started by other numbers: the weight becomes what that start left."""
    want = saved("pissa(iterations = 1)", tmp_path, "seed = 3")
    model = changed("pissa(iterations = 1)")
    assert relative(logits(model), logits(want)) > 1e-2
    model.load_adapter(tmp_path)
    assert relative(logits(model), logits(want)) < 2e-6
    with model.disable_adapter():
        assert relative(logits(model), logits(llama(2))) < 2e-6


def test_a_state_of_the_adapters(tmp_path: Path) -> None:
    """What `Trainer` resumes from."""
    want = changed("pissa(iterations = 1)", more="seed = 3")
    scatter(want)
    model = changed("pissa(iterations = 1)")
    assert not model.load_state_dict(want._adapter_state(), strict=False).missing_keys
    assert relative(logits(model), logits(want)) < 2e-6
    assert relative(logits(model), logits(llama(2))) > 1e-2


def test_a_failed_load_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("pissa", tmp_path, "seed = 3")
    model = compiled("target o_proj", llama(2))
    before = dict(model.named_parameters())
    values = logits(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(type(model), "_activate", fail)
    with pytest.raises(RuntimeError, match="injected"):
        model.load_adapter(tmp_path, "other")
    monkeypatch.undo()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(logits(model), values)


def test_two_that_change_one_weight_are_refused(tmp_path: Path) -> None:
    saved("olora", tmp_path)
    model = changed("pissa", llama(2))
    with pytest.raises(lora_fx.LoraFxError, match="both change the weight"):
        model.load_adapter(tmp_path, "other")
    assert list(model.lora_fx_adapters) == ["default"]


REFUSED = {
    "adapter a { init = pissa target q_proj } adapter b { init = olora target q_proj }": (
        "only one adapter can"
    ),
    'adapter a { init = pissa target q_proj } adapter b { target o_proj train "**.0.**.q_proj" }': (
        "trains a weight that `a` changes"
    ),
    "layers { replicate 0..2, 0..2 } adapter a { init = pissa target q_proj }": (
        "several modules share it"
    ),
    "adapter a { alpha = 0 init = pissa target q_proj }": "scaling above 0",
    "adapter a { init = pissa variant = kasa target q_proj }": "do not go together",
    "adapter a { init = loftq lora_bias = true target q_proj }": "do not go together",
    "adapter a { init = pissa target embed_tokens }": "an embedding has no init `pissa`",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text: str) -> None:
    with pytest.raises(lora_fx.LoraFxError, match=REFUSED[text]):
        lora_fx.compile(llama(2), f"lora 1 {text}", backend=None)


LOFTQ = ["loftq", "loftq(bits = 4, iterations = 3)", "loftq(bits = 8)"]


def quantised(weight: Tensor, bits: int) -> Tensor:
    """By bitsandbytes' own codes; what its CPU kernels make of them is not always right."""
    if bits == 8:
        rows, scales, _ = bitsandbytes.int8_vectorwise_quant(weight.half())
        return rows * scales[:, None] / 127
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    blocks = state.code[codes][: weight.numel()].split(64)
    return torch.cat([b * s for b, s in zip(blocks, state.absmax, strict=True)]).view_as(weight)


@pytest.mark.parametrize("scaling", [1, 1.7])
@pytest.mark.parametrize("init", LOFTQ)
def test_loftq_is_its_algorithm(init: str, scaling: float) -> None:
    bits = 8 if "8" in init else 4
    iterations = int(init[-2]) if "iterations" in init else 1
    base = llama(1).half().float()  # bitsandbytes takes 8 bits of half precision
    model = compiled(f"rank = 4 scaling = {scaling} init = {init} target up_proj", base)
    W = base.model.layers[0].mlp.up_proj.weight.detach()
    near = W
    for _ in range(iterations):
        Q = quantised(near, bits)
        U, S, V = np.linalg.svd((W - Q).double().numpy(), full_matrices=False)
        low = torch.from_numpy((U[:, :4] * S[:4]) @ V[:4]).float()
        near = W - low
    ((fqn, weight),) = weights(model).items()
    A, B = (live_tensors(model, "default")[f"{fqn}.lora_{x}.weight"] for x in "AB")
    tolerance = 1e-6 if bits == 4 else 1e-3
    assert relative(weight, Q) < tolerance
    assert relative(scaling * B @ A, low) < (3e-5 if bits == 4 else 0.2)
    assert relative(original(model.get_submodule(fqn)), W) < relative(weight, W)
    assert len({round(v / weight[0].abs().max().item(), 6) for v in weight[0].tolist()}) < 33


@pytest.mark.parametrize("init", LOFTQ)
def test_loftq_comes_back(init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(init, tmp_path / "saved")
    base, text = llama(2), f"lora 1 adapter default {{ {SPEC.format(init=init, more='')} }}"
    lora_fx.build(text, base, tmp_path / "artifact")
    fresh = lora_fx.compile(base, text, backend=None)
    monkeypatch.setattr(torch.linalg, "svd", None)
    for folder, want in (("saved", model), ("artifact", fresh)):
        again = lora_fx.load(tmp_path / folder, llama(2), backend=None)
        for fqn, weight in weights(want).items():
            assert torch.equal(weights(again)[fqn], weight)
        assert torch.equal(logits(again), logits(want))
        with again.disable_adapter(), want.disable_adapter():
            assert torch.equal(logits(again), logits(want))
            assert 1e-4 < relative(logits(again), logits(base)) < 0.1
    with pytest.raises(lora_fx.LoraFxError, match="adapter-other-base"):
        lora_fx.load(tmp_path / "saved", llama(2).bfloat16(), backend=None)


def test_loftq_of_a_folder_of_peft(tmp_path: Path) -> None:
    """It holds A and B; the weight that PEFT quantises is quantised here too."""
    model = saved("loftq", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == "loftq"
    assert config["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 1}
    (tmp_path / "changed_weights.safetensors").unlink()
    again = lora_fx.load(tmp_path, llama(2), backend=None)
    assert relative(logits(again), logits(model)) < 2e-6


def test_loftq_at_some_modules_cannot_be_saved(tmp_path: Path) -> None:
    text = "rank = 4 target q_proj { init = loftq } target o_proj"
    with pytest.raises(lora_fx.LoraFxError, match="peft-cannot-say"):
        compiled(text, llama(1)).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_head(tmp_path: Path) -> None:
    """PEFT saves an adapted head's weight beside the adapter: not the one that is left."""
    model = compiled("rank = 4 alpha = 6 init = pissa target lm_head, q_proj", llama(2))
    scatter(model)
    model.save_pretrained(tmp_path)
    again = lora_fx.load(tmp_path, llama(2), backend=None)
    assert torch.equal(logits(again), logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = PeftModel.from_pretrained(llama(2), tmp_path).eval()
    assert relative(logits(want), logits(model)) < 1e-5


def test_a_head_that_peft_has_changed_and_brings_along(tmp_path: Path) -> None:
    """Without `save_embedding_layers=False` PEFT writes what is left of the head's weight."""
    want = peft(llama(2), ["lm_head"], init_lora_weights="pissa").eval()
    for name, parameter in want.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    for name, given in (("with", True), ("without", False)):
        want.save_pretrained(tmp_path / name, save_embedding_layers=given)
    with pytest.raises(lora_fx.LoraFxError, match=r"init `pissa` changes.*save_embedding_layers=F"):
        lora_fx.load(tmp_path / "with", llama(2), backend=None)
    model = lora_fx.load(tmp_path / "without", llama(2), backend=None)
    assert relative(logits(model), logits(want)) < 1e-5
    assert relative(logits(model), logits(llama(2))) > 1e-2


def test_copies_of_layers_with_weights_of_their_own() -> None:
    layers = "layers { replicate 0..2, 0..2  share = nothing }"
    text = f"lora 1 {layers} adapter a {{ rank = 3 init = pissa target q_proj }}"
    model = lora_fx.compile(llama(2), text, backend=None)
    want = lora_fx.compile(llama(2), text.replace("init = pissa", ""), backend=None)
    assert relative(logits(model), logits(want)) < 2e-6


def test_a_tied_head_is_refused() -> None:
    base = llama(2, tie_word_embeddings=True)
    with pytest.raises(lora_fx.LoraFxError, match="several modules share it"):
        lora_fx.compile(base, "lora 1 adapter a { init = pissa target lm_head }", backend=None)


@pytest.mark.parametrize("layout", ["plain", "augmented"])
def test_the_plan_counts_what_is_held(layout: str) -> None:
    text = f"lora 1 adapter default {{ {SPEC.format(init='pissa', more='')} }}"
    text += f" compile {{ layout = {layout} }}"
    base = llama(2)
    plan = lora_fx.plan(text, base)
    other = lora_fx.plan(text.replace("init = pissa", ""), base)
    changed = [base.get_submodule(site.fqn).weight for site in plan.sites]
    starts = sum(s.rank * (s.in_features + s.out_features) for s in plan.sites)
    held = sum(w.nbytes for w in changed) if layout == "plain" else 0
    more = plan.memory()["adapters"] - other.memory()["adapters"]
    assert more == held + 4 * starts
    assert plan.all - other.all == starts
    model = lora_fx.compile(base, text)
    assert sum(p.numel() for p in model.parameters()) == plan.all


@pytest.mark.parametrize("init", [*INITS, "loftq"])
def test_a_quantised_weight_is_refused(init: str) -> None:
    text = f"rank = 2 init = {init} target q_proj"
    with pytest.raises(lora_fx.LoraFxError, match="of a quantised weight"):
        compiled(text, nf4(llama(2)))


@pytest.mark.parametrize("init", INITS)
def test_an_offloaded_weight_is_refused(init: str) -> None:
    with pytest.raises(lora_fx.LoraFxError, match="and it is offloaded"):
        compiled(f"rank = 2 init = {init} target q_proj", cpu_offload(llama(2)), inplace=True)


def test_mica_of_an_offloaded_weight() -> None:
    model = compiled("rank = 2 init = mica target q_proj", cpu_offload(llama(2)), inplace=True)
    want = compiled("rank = 2 init = mica target q_proj", llama(2))
    for name, tensor in live_tensors(want, "default").items():
        assert torch.equal(live_tensors(model, "default")[name], tensor)


@pytest.mark.parametrize("init", [*INITS, "loftq", "mica", "eva", "corda", "lora_ga"])
def test_a_graph_without_values(init: str) -> None:
    """What `lora-fx show` does: the model is on meta, and there is no data."""
    with torch.device("meta"):
        base = llama(2)
    text = f"lora 1 adapter default {{ rank = 4 init = {init} target linear }}"
    model = lora_fx.compile(base, text)
    ids = torch.ones(2, 7, dtype=torch.long, device="meta")
    text = lora_fx.capture(model, input_ids=ids, use_cache=False).text("adapted")
    assert "lora_fx.expand(" in text
    assert "q_proj.lora_A.default.weight" in text
    assert "q_proj.lora_start_A.default.weight" not in text
    with model.disable_adapter():
        off = lora_fx.capture(model, input_ids=ids, use_cache=False).text("adapted")
    changes = init not in ("mica", "eva")
    assert ("q_proj.lora_start_A.default.weight" in off) == changes
    assert "lora_A.default.weight" not in off


@pytest.mark.parametrize("unit", ["layers", "model"])
def test_layers_computed_again_in_backward(unit: str) -> None:
    text = f"lora 1 adapter default {{ {SPEC.format(init='pissa', more='')} }}"
    want = lora_fx.compile(llama(3), text, backend=None)
    more = f" compile {{ checkpoint = layers  unit = {unit} }}"
    model = lora_fx.compile(llama(3), text + more, backend="eager")
    for one in (model, want):
        scatter(one)
        one.train()
    assert_equal(step(model, tokens()), step(want, tokens()))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            '{"model.layers.0.mlp.gate": ["pissa", "x"]}',
            r"`model\.layers\.0\.mlp\.gate`.*cannot be",
        ),
        ('{"model.layers.0.mlp.up_proj": ["gaussian", "x"]}', "`gaussian` changed it"),
        ('{"model.layers.0.mlp.up_proj": ["pissa", "x"]}', "another than|and was x"),
        ('{"model.layers.0.mlp.up_proj": "pissa"}', "no such table"),
        ("[", "no such table"),
    ],
)
def test_a_header_that_makes_no_sense(said: str, message: str, tmp_path: Path) -> None:
    model = compiled("rank = 4 target up_proj", llama(2))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "lora_fx.changed_weights": said})
    with pytest.raises(lora_fx.LoraFxError, match=message):
        lora_fx.load(tmp_path, llama(2), backend=None)


@pytest.mark.parametrize("init", ["pissa(iterations = 2)", "olora"])
def test_nothing_is_lost_with_a_magnitude(init: str, tmp_path: Path) -> None:
    """DoRA, rsLoRA, ranks by module and a trained module, to PEFT and back."""
    model = saved(init, tmp_path, "variant = dora")
    again = lora_fx.load(tmp_path, llama(2), backend=None)
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert relative(logits(again), logits(llama(2))) < 2e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = PeftModel.from_pretrained(llama(2), tmp_path).eval()
    assert want.peft_config["default"].use_dora
    assert relative(logits(want), logits(model)) < 1e-5
    assert relative(logits(want), logits(llama(2))) > 1e-2


def test_weights_of_a_spec(tmp_path: Path) -> None:
    """By the folder's own config it is plain LoRA; by a spec that says the init, what it was."""
    model = saved("pissa", tmp_path / "saved")
    own = tmp_path / "own.lora"
    own.write_text('lora 1 adapter default { weights = "saved" }')
    said = tmp_path / "said.lora"
    text = SPEC.format(init="pissa", more='weights = "saved"')
    said.write_text(f"lora 1 adapter default {{ {text} }}")
    for file, changes in ((own, False), (said, True)):
        again = lora_fx.compile(llama(2), file, backend=None)
        assert relative(logits(again), logits(model)) < 2e-6
        with again.disable_adapter():
            assert relative(logits(again), logits(llama(2))) < 2e-6
        weight = again.model.layers[0].mlp.up_proj.weight
        given = llama(2).model.layers[0].mlp.up_proj.weight
        assert torch.equal(weight, given) != changes
