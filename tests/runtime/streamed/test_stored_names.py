"""Checkpoints whose tensors are not those of the model: which part of it each is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import lora_fx
from lora_fx.runtime.streamed import stored_names
from lora_fx.runtime.streamed.stored_names import stored_parts
from tests.adapters.kinds import of, scatter
from tests.architectures import ARCHITECTURES
from tests.dense import relative
from tests.example_inputs import example_inputs

MERGE = 'merge production { from one into = base save = "out" }'
EXPERTS = 'parameter "**.experts.{gate_up_proj,down_proj}"'
TARGETS = {
    "mixtral": f'target q_proj, {EXPERTS}, parameter "**.mlp.gate.weight"',
    "qwen3_moe": f"target q_proj, {EXPERTS}",
    "olmoe": 'target q_proj train "**.experts"',
    "vit": "lora_bias = true  target q_proj train classifier",
    "llava": "variant = dora  target q_proj, up_proj",
    "gpt_neox": "target query_key_value, lm_head",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_tensor_of_a_checkpoint(name: str) -> None:
    model = of(name)()
    model.save_pretrained("base")
    stored = load_file("base/model.safetensors")
    parts = stored_parts(model, stored)
    state = model.state_dict()
    assert parts.keys() == stored.keys()
    for key, part in parts.items():
        assert torch.equal(part.of(state[part.fqn].contiguous()), stored[key]), key
    covered = {part.fqn for part in parts.values()}
    assert {state[fqn].data_ptr() for fqn in covered} == {t.data_ptr() for t in state.values()}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**example_inputs(model)).logits


@pytest.mark.parametrize("name", TARGETS)
def test_merged(name: str) -> None:
    base: PreTrainedModel = of(name)()
    base.save_pretrained("base", max_shard_size="40KB")
    text = f"lora 1 adapter default {{ rank = 3 alpha = 5 init = random {TARGETS[name]} }}"
    trained = lora_fx.compile(base, text, backend=None)
    scatter(trained)
    trained.save_pretrained("one")
    Path("a.lora").write_text(f'lora 1 model "base" adapter one {{ weights = "one" }} {MERGE}')
    lora_fx.merge("a.lora")
    got = type(base).from_pretrained("out")
    assert relative(logits(got), logits(trained)) < 1e-5
    assert relative(logits(got), logits(base)) > 1e-3
    before, after = (
        {k for f in Path(p).glob("*.safetensors") for k in load_file(f)} for p in ("base", "out")
    )
    assert before == after


@pytest.mark.parametrize("headless", ["stored", "adapted"])
def test_with_and_without_the_prefix_of_a_base_model(headless: str) -> None:
    """A checkpoint of the model beneath a head, and one of a model with its head."""
    torch.manual_seed(0)
    whole = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=31)).eval()
    (whole.transformer if headless == "stored" else whole).save_pretrained("base")
    base = whole if headless == "stored" else whole.transformer
    text = "lora 1 adapter default { rank = 3 init = random target c_fc }"
    trained = lora_fx.compile(base, text, backend=None)
    scatter(trained)
    trained.save_pretrained("one")
    ids = torch.arange(7)[None]
    with torch.no_grad():
        want = trained(ids)[0]
    config = Path("base/config.json")
    wanted = json.loads(config.read_text()) | {"architectures": [type(base).__name__]}
    config.write_text(json.dumps(wanted))
    Path("a.lora").write_text(f'lora 1 model "base" adapter one {{ weights = "one" }} {MERGE}')
    lora_fx.merge("a.lora")
    got = type(base).from_pretrained("out").eval()
    with torch.no_grad():
        assert relative(got(ids)[0], want) < 1e-5
        assert relative(got(ids)[0], base(ids)[0]) > 1e-3


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_weight_in_pieces(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum can be added to each of them; a norm needs all of the weight."""

    def halved(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in state.items():
            first, _, second = name.partition("up_proj")
            halves = tensor.chunk(2, 1) if second else (tensor,)
            found |= {
                f"{first}up_proj_{i}{second}" if second else name: half.contiguous()
                for i, half in enumerate(halves)
            }
        return found

    base = of("llama")()
    save_file(halved(base, base.state_dict()), Path("pieces.safetensors"))
    base.save_pretrained("base")
    Path("pieces.safetensors").rename("base/model.safetensors")
    monkeypatch.setattr(stored_names, "revert_weight_conversion", halved)
    text = f"lora 1 adapter default {{ rank = 3 init = random variant = {variant} target up_proj }}"
    trained = lora_fx.compile(base, text, backend=None)
    scatter(trained)
    trained.save_pretrained("one")
    Path("a.lora").write_text(f'lora 1 model "base" adapter one {{ weights = "one" }} {MERGE}')
    if variant == "dora":
        with pytest.raises(lora_fx.LoraFxError, match=r"stores `.*` in pieces, as `.*up_proj_0"):
            lora_fx.merge("a.lora")
        return
    lora_fx.merge("a.lora")
    want = halved(base, trained.merge_and_unload().state_dict())
    got = load_file("out/model.safetensors")
    assert got.keys() <= want.keys()
    pieces = [name for name in got if "up_proj_" in name]
    assert len(pieces) == 2 * base.config.num_hidden_layers
    for name in pieces:
        assert torch.allclose(got[name], want[name], 1e-5, 1e-6)
        assert relative(got[name], load_file("base/model.safetensors")[name]) > 1e-3
