"""Whatever is switched, and when: what is in force afterwards is right, in mixed batches too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.diagnostics import LoraFxError
from tests.dense import relative
from tests.tiny import llama, tokens

OWN = """lora 1
adapter a { rank = 2  init = random  target q_proj  train "model.norm" }
adapter b { rank = 3  init = random  target q_proj }
"""
IDS = tokens(2, 5)


def model(spec: str = OWN) -> Any:
    """Return a model of which what `a` trains as a whole differs from the base's."""
    made: Any = lora_fx.compile(llama(2), spec, backend=None).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters(remove_duplicate=False):
            if "lora_own.a" in name:
                parameter.add_(0.5)
    return made


def logits(of: nn.Module, *names: str) -> Tensor:
    with torch.no_grad():
        return of(IDS, **({"adapter_names": list(names)} if names else {})).logits


def rescaled(made: Any) -> None:
    with made.rescale_adapter_scale(0.5):
        pass


def off_and_on(made: Any) -> None:
    with made.disable_adapter():
        pass


def cast(made: Any) -> None:
    made.float()


COMMANDS = {
    "set_adapter": lambda made: made.set_adapter("a"),
    "disable_adapter": off_and_on,
    "rescale_adapter_scale": rescaled,
    "float": cast,
    "delete_adapter": lambda made: made.delete_adapter("c"),
}


@pytest.mark.parametrize("spec", [OWN, OWN + "route { slots = 5  max_rank = 3 }"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_inside_a_mixed_batch(command: str, spec: str) -> None:
    made = model(spec + "adapter c { rank = 2  init = random  target v_proj }")
    made.set_adapter("a")
    want, other = logits(made), logits(made, "b", "b")
    layer = made.model.layers[1]
    hook = layer.register_forward_pre_hook(lambda *_: COMMANDS[command](made))
    if command == "delete_adapter" and "slots" in spec:  # whose columns stand behind
        with pytest.raises(LoraFxError, match="while a mixed batch runs"):
            logits(made, "a", "b")
    else:
        logits(made, "a", "b")
    hook.remove()
    assert torch.equal(logits(made), want)
    assert relative(other, want) > 1e-3


@pytest.mark.parametrize("command", ["load_adapter", "add_weighted_adapter", "delete_adapter"])
def test_columns_stay_while_a_mixed_batch_runs(command: str, tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path)
    commands = {
        "load_adapter": lambda *_: made.load_adapter(tmp_path / "b", "new"),
        "add_weighted_adapter": lambda *_: made.add_weighted_adapter(["a", "b"], [1, 1], "new"),
        "delete_adapter": lambda *_: made.delete_adapter("a"),
    }
    want = logits(made), logits(made, "a", "b")
    hook = made.model.layers[1].register_forward_pre_hook(commands[command])
    with pytest.raises(LoraFxError, match="while a mixed batch runs"):
        logits(made, "a", "b")
    hook.remove()
    assert list(made.lora_fx_adapters) == ["a", "b"]
    assert all(map(torch.equal, (logits(made), logits(made, "a", "b")), want))


@pytest.mark.parametrize("active", ["a", "b"])
def test_a_state_with_another_start_is_seen_at_once(active: str) -> None:
    base = llama(2).eval()
    with torch.no_grad():
        want = base(IDS).logits
    made = model(
        OWN.replace("init = random  target q_proj  train", "init = pissa  target q_proj  train")
    )
    state = {name: tensor.clone() for name, tensor in made._adapter_state().items()}
    for name in state:
        if "lora_start_A" in name:
            state[name] *= 3
    made.set_adapter(active)
    alone = logits(made)
    made.load_state_dict(state, strict=False)
    assert relative(logits(made, "__base__", "__base__"), want) < 1e-5
    assert (relative(logits(made), alone) < 1e-5) is (active == "b")
    assert relative(logits(made, "a", "a"), want) > 1e-3


def test_assigned_tensors_are_seen_in_mixed_batches() -> None:
    made = model()
    before = logits(made, "a", "a")
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    for name in state:
        if "lora_own.a" in name:
            state[name] += 1
    made.load_state_dict(state, assign=True)
    made.set_adapter("a")
    assert relative(logits(made, "a", "a"), logits(made)) < 1e-5
    assert relative(logits(made), before) > 1e-3


def test_a_mixed_batch_after_a_merge_that_failed() -> None:
    made = model(OWN.replace("rank = 3", "rank = 3  tokens [3, 7]"))
    want = logits(made, "a", "b")
    rows = next(p for name, p in made.named_parameters() if "lora_tokens" in name)
    with torch.no_grad():
        kept, rows[0, 0] = rows[0, 0].clone(), float("nan")
        with pytest.raises(LoraFxError, match="NaN"):
            made.merge_and_unload(adapter_names="b")
        rows[0, 0] = kept
    assert torch.equal(logits(made, "a", "b"), want)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_step_of_training_after_switching_in_inference_mode(backend: Any) -> None:
    spec = OWN.replace("rank = 3", "rank = 3  alpha = 9")
    made: Any = lora_fx.compile(llama(2), spec, backend=backend)
    with torch.inference_mode():
        made.eval().set_adapter("b")
        made(IDS)
    made.set_adapter("b")
    made.train()(input_ids=IDS, labels=IDS).loss.backward()
    site = made.model.layers[0].self_attn.q_proj
    assert site.lora_B["b"].weight.grad.abs().max() > 0
