"""The files and models that the examples of the pages are about."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fx
from lora_fx.plan.lock_file import write_lock
from tests.tiny import llama

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SPEC = "lora 1\nadapter default {target q_proj}\n"  # not as `fmt` would write it
TWO = "lora 1\nadapter sql { target q_proj }\nadapter style { target v_proj }\n"


def compiled(backend: Any = None) -> nn.Module:
    """A Llama of four layers with the adapters `sql` and `style`."""
    return lora_fx.compile(llama(4), TWO, backend=backend)


def write_files() -> None:
    """Write what examples name, beside them."""
    Path("spec.lora").write_text(SPEC)
    for name, config in {
        "vision": {"model_type": "vit", "num_hidden_layers": 1},
        "language": llama(4).config.to_dict(),
    }.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(config))
    chain = Path("presets/chain")
    chain.mkdir(parents=True)
    for i in range(1, 16):
        (chain / f"{i:02}.lora").write_text(f'lora 1\ninclude "{i + 1:02}.lora"\n')
    for path in (chain / "16.lora", Path("presets/attention.lora")):
        path.write_text("lora 1\npreset attention { rank = 4 }\n")
    Path("presets/back.lora").write_text('lora 1\ninclude "../spec.lora"\n')
    _write_locks()
    _save("adapters/sql")


def _write_locks() -> None:
    Path("language/deeper.json").write_text(json.dumps(llama(5).config.to_dict()))
    for name in ("locked", "damaged"):
        Path(f"{name}.lora").write_text(SPEC)
    write_lock(lora_fx.plan("locked.lora", "language"))
    Path("damaged.lora.lock").write_text('{"lock": 1, "adap')


def write_adapters(example: str) -> None:
    """Write the folders of adapters that an example loads."""
    for name, write in _ADAPTERS.items():
        if f'"{name}"' in example and not Path(name).exists():
            write(name)


def _save(name: str, spec: str = SPEC, **sizes: int) -> None:
    lora_fx.compile(llama(4, **sizes), spec, backend=None).save_pretrained(name)


def _saved(spec: str, **sizes: int) -> Callable[[str], None]:
    return lambda name: _save(name, spec, **sizes)


def _configured(**settings: Any) -> Callable[[str], None]:
    def write(name: str) -> None:
        _save(name)
        _set(name, **settings)

    return write


def _set(name: str, **settings: Any) -> None:
    path = Path(name, CONFIG)
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def _changed(change: Callable[[dict[str, Tensor]], object]) -> Callable[[str], None]:
    def write(name: str) -> None:
        _save(name)
        state = load_file(Path(name, TENSORS))
        change(state)
        save_file(state, Path(name, TENSORS))

    return write


def _cut_off(name: str) -> None:
    _save(name)
    Path(name, TENSORS).write_bytes(Path(name, TENSORS).read_bytes()[:-1])


def _retargeted(name: str) -> None:
    _save(name, SPEC.replace("q_proj", "q_proj, v_proj"))
    _set(name, target_modules=["q_proj"])


_ADAPTERS: dict[str, Callable[[str], None]] = {
    "trained": _save,
    "checkpoint-200": _save,
    "checkpoint-300": _changed(lambda state: next(iter(state.values())).fill_(torch.nan)),
    "quantised": _changed(lambda state: state.update({k: t.int() for k, t in state.items()})),
    "incomplete": _changed(lambda state: state.popitem()),
    "larger-rank": _saved("lora 1 adapter default { rank = 12 target q_proj }"),
    "for-a-larger-model": _saved(SPEC, hidden_size=64),
    "replicated": _saved(f"{SPEC} layers {{ replicate 0..3, 1..4 }}"),
    "changed-config": _retargeted,
    "cut-off": _cut_off,
    "compressed": _configured(velora_config={"num_groups": 4}, init_lora_weights="pissa"),
}
