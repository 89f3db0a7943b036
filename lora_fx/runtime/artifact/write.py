"""Write an artifact of a compiled model."""

import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.diagnostics import Span
from lora_fx.graph.program import Program
from lora_fx.graph.verify import STAGES
from lora_fx.plan.lock import lock_of
from lora_fx.runtime.artifact import layout
from lora_fx.runtime.artifact.base import Place, seen_from
from lora_fx.runtime.artifact.entries import programs
from lora_fx.runtime.artifact.kernels import kept_in
from lora_fx.runtime.artifact.key import key_of
from lora_fx.runtime.artifact.manifest import Function, Manifest, hashes, write_manifest
from lora_fx.runtime.artifact.recorder import Recorder
from lora_fx.runtime.artifact.trust import trust
from lora_fx.runtime.methods.adapters import write_adapter
from lora_fx.runtime.progress import Report
from lora_fx.runtime.units.unit import Compiled
from lora_fx.spec.flat import flat_text
from lora_fx.spec.spec import EntrySpec, Spec


def write_artifact(model: Any, folder: Path, origin: Place | None, report: Report) -> None:
    """Write everything of an artifact into an empty folder, and trust its code.

    The model is compiled and has not run; afterwards it has, and is of no further use. `report`
    hears what is being done, and how many steps of how many are.
    """
    plan = model.lora_fx_plan
    text = flat_text(plan.spec, folder, dict(_own_weights(plan.spec)))
    (folder / layout.SPEC).write_text(text, encoding="utf-8")
    _write_json(folder / layout.LOCK, lock_of(plan).to_json())
    _write_json(folder / layout.PLAN, plan.to_json())
    for adapter in plan.adapters:
        place = folder / layout.ADAPTERS / adapter.name
        write_adapter(model, adapter, place, False, place)
    device = next((p.device.type for p in model.parameters()), "cpu")
    functions = _compile(model, folder, report)
    manifest = Manifest(
        model=seen_from(origin, folder),
        device=device,
        key=key_of(model, text, device) if plan.spec.compile.entries else {},
        functions=functions,
        files=hashes(folder),
    )
    write_manifest(folder, manifest)
    if not trust(manifest.code_digest()):
        message = "what this user has compiled cannot be kept record of: `load` needs `trust_cache`"
        warnings.warn(message, stacklevel=3)


def _compile(model: nn.Module, folder: Path, report: Report) -> tuple[Function, ...]:
    """Run every entry, and write what was compiled for it."""
    entries = model.lora_fx_plan.spec.compile.entries  # type: ignore[union-attr]
    steps = [(entry, run) for entry in entries for run in programs(model, entry)]
    if not steps:
        return ()
    units = [module for module in model.modules() if isinstance(module, Compiled)]
    given: Any = units[0].lora_fx_unit
    recorder = Recorder(given)
    for unit in units:
        unit.lora_fx_unit = recorder
    texts = _Texts(model, folder / layout.GRAPHS, recorder)
    given.backend.seen = texts.write
    (folder / layout.CACHE).mkdir()
    with kept_in(folder / layout.KERNELS), torch.random.fork_rng(_gpus(model)):
        for done, (entry, run) in enumerate(steps):
            report(f"compiling `entry {entry.name}`", done, len(steps))
            if entry is not texts.entry:
                recorder.begin()
                texts.entry = entry
            run()
    return tuple(_written(recorder, folder))


def _gpus(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def _written(recorder: Recorder, folder: Path) -> Iterator[Function]:
    (folder / layout.FUNCTIONS).mkdir()
    for number, (function, training, grad) in enumerate(recorder.functions):
        name = f"{layout.FUNCTIONS}/{number:03}.bin"
        function.save(folder / name)
        yield Function(name, training, grad)


class _Texts:
    """Writes each graph at each stage, numbered as they come."""

    def __init__(self, model: nn.Module, folder: Path, recorder: Recorder) -> None:
        self._names = {id(module): fqn for fqn, module in model.named_modules()}
        self._folder = folder
        self._recorder = recorder
        self._count = 0
        self.entry: EntrySpec | None = None

    def write(self, program: Program) -> None:
        assert self.entry is not None
        folder = self._folder / self.entry.name
        folder.mkdir(parents=True, exist_ok=True)
        named = dataclasses.replace(program, fqn=self._names[id(self._recorder.module)])
        for stage in STAGES:
            path = folder / f"{self._count:02}-{stage}.txt"
            path.write_text(f"{named.text(stage)}\n", encoding="utf-8")
        self._count += 1


def _own_weights(spec: Spec) -> Iterator[tuple[Span, str]]:
    """Yield what the paths of `weights` become: the artifact has the adapters itself."""
    for adapter in spec.adapters:
        setting = adapter.settings.get("weights")
        while setting is not None:
            yield setting.span, f"{layout.ADAPTERS}/{adapter.name}"
            setting = setting.over


def _write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
