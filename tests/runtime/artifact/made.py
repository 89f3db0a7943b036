"""Artifacts of tiny models, with one program for each entry: compiling takes long."""

from pathlib import Path
from typing import Any

import pytest

import lora_fx
from lora_fx.runtime.artifact import entries
from tests.tiny import llama

BATCH, LENGTH = 3, 11


def text(names: str = "forward", more: str = "", adapter: str = "") -> str:
    """A spec with these entries."""
    sizes = f"{{ batch = {BATCH}  sequence = {LENGTH} }}"
    declared = " ".join(f"entry {name} {sizes}" for name in names.split())
    return f"""lora 1
adapter default {{ rank = 2  init = random  alpha = 6 {adapter} target q_proj, up_proj }}
compile {{ {more} {declared} }}
"""


def one_program_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the ways in which Trainer and TRL call a model otherwise."""
    programs = entries.programs
    monkeypatch.setattr(
        "lora_fx.runtime.artifact.write.programs", lambda *args: programs(*args)[:1]
    )


def build(out: Path, spec: str, layers: int = 2, **settings: Any) -> Any:
    """Build an artifact of a tiny Llama, and return the model that it is of."""
    base = llama(layers)
    lora_fx.build(spec, base, out, **settings)
    return base
