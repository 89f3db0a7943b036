"""Diagnostics that take more than a file to make, `model/<code>.expect`."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from peft import LoraConfig
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import lora_fx
from lora_fx.cli.graphs import program
from lora_fx.diagnostics import LoraFxError, render
from tests.architectures import ARCHITECTURES
from tests.golden import assert_golden
from tests.odd_models import Blending, Branching, Reading
from tests.plan.models import Tower
from tests.tiny import llama, spec, tokens

HERE = Path(__file__).parent


def model(**settings: str) -> nn.Module:
    return lora_fx.compile(llama(2), spec(**settings), backend=None)


def saved() -> str:
    model(adapter="rank = 3 alpha = 6").save_pretrained("saved")
    return "saved"


def empty_folder() -> None:
    Path("empty").mkdir()
    lora_fx.load("empty", llama(2))


def too_many_graphs() -> None:
    compiled = lora_fx.compile(llama(1), spec(), backend="eager")
    compiled(tokens())
    with torch.no_grad():
        compiled(tokens())


def run_odd(base: nn.Module, targets: str) -> None:
    text = f"lora 1 adapter default {{ rank = 2 target {targets} }}"
    lora_fx.compile(base, text, backend="eager")(torch.ones(3, 5))


def vision_model() -> None:
    Path("a.lora").write_text("lora 1 adapter x { target linear }")
    Path("config.json").write_text('{"model_type": "vit", "num_hidden_layers": 1}')
    program(Path("a.lora"), "config.json", 0, True)


CONFLICT = """lora 1
adapter one { target q_proj train "model.norm" }
adapter two { target v_proj train "model.norm" }
"""

NOT_YET = """lora 1
adapter default {
  rank = 2
  target linear
  target q_proj, k_proj { init = pissa(iterations = 4)  variant = velora }
}
adapter other {
  rank = 2
  target linear { variant = bdlora(blocks = 2, strict = false) }
  target down_proj { variant = lora }
}
"""

UNSAID = """lora 1
adapter default {
  dtype = bfloat16
  target q_proj { dropout = 0.1 }
  target v_proj in layers[1..]
}
route { default -> default }
"""


def chain_of_files() -> None:
    for i in range(20):
        Path(f"{i}.lora").write_text(f'lora 1 include "{i + 1}.lora"')
    lora_fx.parse(Path("0.lora"))


def other_base() -> None:
    text = "lora 1 adapter a { init = pissa target q_proj, v_proj }"
    lora_fx.compile(llama(2), text, backend=None).save_pretrained("saved")
    lora_fx.load("saved/a", llama(2).bfloat16())


def lost_start() -> None:
    config = Path(saved()) / "adapter_config.json"
    values = json.loads(config.read_text()) | {"init_lora_weights": "pissa_niter_4"}
    config.write_text(json.dumps(values))
    lora_fx.load("saved", llama(2))


def replaced_forward() -> None:
    base = llama(2)
    base.model.layers[1].self_attn.q_proj.forward = lambda x: x
    lora_fx.compile(base, "lora 1 adapter x { target q_proj }", backend=None)


ONE_GRAPH = "lora 1 adapter x { target q_proj } compile { unit = model }"


def hooks_in_the_way() -> None:
    base = cpu_offload(llama(2))
    add_hook_to_module(base.model.layers[0].mlp, AlignDevicesHook("meta"))
    add_hook_to_module(base.model.layers[1].mlp, ModelHook())
    lora_fx.compile(base, ONE_GRAPH)


def damaged_artifact() -> None:
    lora_fx.build(spec(), llama(2), "artifact")
    Path("artifact/plan.json").unlink()
    with Path("artifact/spec.lora").open("a") as file:
        file.write("# rank 8 was too small")
    lora_fx.load("artifact", llama(2))


def artifact_of_another() -> None:
    lora_fx.build(spec(), llama(2), "artifact")
    lora_fx.load("artifact", llama(2, hidden_size=64))


def artifact_twice() -> None:
    for _ in range(2):
        lora_fx.build(spec(), llama(2), "artifact")


UNMERGEABLE = """lora 1
adapter default { rank = 2  target embed_tokens  target q_proj, lm_head { lora_bias = true } }
layers { replicate 0..2, 1..2 }
"""


def merged() -> nn.Module:
    compiled = model()
    compiled.merge_adapter()
    return compiled


def diverged() -> None:
    compiled = model()
    for layer in compiled.model.layers:
        layer.mlp.up_proj.lora_B.default.weight.data[1, 1] = torch.inf
    compiled.merge_adapter()


GENERATE = """lora 1
adapter default { target q_proj }
compile { entry generate { batch = 1  sequence = 8 } }
"""

ROUTED = """lora 1
adapter one { target k_proj }
adapter two { target q_proj }
"""


def routed(*names: str) -> None:
    compiled = lora_fx.compile(llama(2), ROUTED, backend=None).eval()
    compiled(input_ids=tokens(3, 8), adapter_names=[*names])


def opt() -> nn.Module:
    config = OPTConfig(
        num_hidden_layers=2, hidden_size=32, ffn_dim=44, num_attention_heads=4,
        word_embed_proj_dim=32, vocab_size=101,
    )  # fmt: skip
    return OPTForCausalLM(config)


CASES: dict[str, Callable[[], object]] = {
    "unknown-adapter": lambda: model().set_adapter("defualt"),
    "adapter-twice": lambda: model().set_adapter(["default", "default"]),
    "adapter-exists": lambda: model().load_adapter(saved(), "default"),
    "adapter-name": lambda: model().load_adapter(saved(), "keys"),
    "adapter-conflict": lambda: lora_fx.compile(llama(2), CONFLICT, backend=None).set_adapter(
        ["one", "two"]
    ),
    "adapter-merged": lambda: merged().delete_adapter("default"),
    "bad-routing": lambda: routed("one", "two"),
    "not-routable": lambda: lora_fx.compile(
        ARCHITECTURES["vit"](),
        "lora 1 adapter x { target linear except classifier  train embeddings }"
        " route { slots = 1 }",
    ),
    "rows-not-samples": lambda: lora_fx.compile(
        opt(), "lora 1 adapter x { target linear } route { train = true }"
    ),
    "no-weights": lambda: lora_fx.compile(
        llama(2), "lora 1 adapter sql { target q_proj } merge both { from sql }", backend=None
    ),
    "cannot-combine": lambda: lora_fx.compile(
        llama(2),
        "lora 1 adapter a { rank = 20 target q_proj } adapter b { rank = 15 target q_proj }",
        backend=None,
    ).add_weighted_adapter(["a", "b"], [1.0, 0.5], "both", "cat"),
    "cannot-convert": lambda: model().convert_adapter("default", "small", 1.5),
    "cannot-swap": lambda: model(adapter="rank = 2").hotswap_adapter(saved(), "default"),
    "no-slot": lambda: lora_fx.compile(
        llama(2), f"{spec(adapter='rank = 2')} route {{ slots = 2 }}", backend=None
    ).load_adapter(saved(), "new"),
    "cannot-rescale": lambda: model().rescale_adapter_scale(float("nan")).__enter__(),
    "cannot-merge": lambda: lora_fx.compile(
        llama(2, tie_word_embeddings=True), UNMERGEABLE, backend=None
    ).merge_adapter(),
    "merge-not-finite": diverged,
    "no-optimizer": lambda: lora_fx.optimizer(model()),
    "add-adapter": lambda: model().add_adapter(LoraConfig()),
    "no-adapter": empty_folder,
    "adapter-other-base": other_base,
    "adapter-lost-start": lost_start,
    "calibration-data": lambda: lora_fx.compile(
        llama(2), "lora 1\nadapter a {\n  init = corda\n  target q_proj\n}"
    ),
    "no-such-layer": lambda: lora_fx.capture(model(), layer=1, input_ids=tokens()),
    "no-example-input": vision_model,
    "too-many-graphs": too_many_graphs,
    "no-such-module": lambda: lora_fx.plan(spec(), llama(2)).explain("model.layers.0.mlp.up_prj"),
    "not-capturable": lambda: run_odd(Branching(), "up"),
    "site-never-called": lambda: run_odd(Reading(), "up, proj"),
    "unsupported-use": lambda: run_odd(Blending(), 'parameter "experts"'),
    "not-invocable": lambda: lora_fx.compile(
        opt(), "lora 1 adapter x { variant = alora(tokens = [3, 4]) target linear }"
    ),
    "not-supported-yet": lambda: lora_fx.compile(llama(2), NOT_YET),
    "peft-cannot-say": lambda: lora_fx.parse(UNSAID).to_peft(),
    "peft-no-targets": lambda: lora_fx.from_peft({"target_modules": ["nothing"]}, llama(2)),
    "peft-needs-model": lambda: lora_fx.from_peft({"r": 8}),
    "file-too-large": lambda: lora_fx.parse("lora 1\n" + "# a long file\n" * 20_000),
    "include-too-much": chain_of_files,
    "no-layers": lambda: lora_fx.compile(
        nn.Sequential(nn.Linear(5, 7)),
        "lora 1 adapter x { rank = 2 target linear } compile { checkpoint = layers }",
    ),
    "budget-needs-inductor": lambda: lora_fx.compile(
        llama(2),
        "lora 1 adapter x { target q_proj } compile { checkpoint = budget(0.5) }",
        backend="eager",
    ),
    "no-estimate": lambda: lora_fx.plan(
        "lora 1 adapter x { rank = 1 target linear }", Tower()
    ).memory(8),
    "replaced-forward": replaced_forward,
    "hook-in-the-way": hooks_in_the_way,
    "artifact-damaged": damaged_artifact,
    "artifact-exists": artifact_twice,
    "artifact-other-model": artifact_of_another,
    "entry-impossible": lambda: lora_fx.build(GENERATE, llama(2).model, "artifact"),
    "no-model": lambda: lora_fx.plan("lora 1"),
    "ambiguous-stack": lambda: lora_fx.plan(
        "lora 1 layers { replicate 0..2 }", nn.ModuleDict({"a": Tower(2), "b": Tower(3)})
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if (
        name == "too-many-graphs"
        and "recompile_limit" not in inspect.signature(torch.compile).parameters
    ):
        pytest.skip("torch 2.11 has only the limit of the process")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_fx.runtime.units.unit.GRAPHS_PER_UNIT", 1)
    with pytest.raises(LoraFxError) as raised:
        CASES[name]()
    text = render(raised.value.diagnostics)
    assert f"[{name}]" in text
    assert_golden(HERE / "model" / f"{name}.expect", text)
