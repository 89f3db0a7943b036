"""Paths that are relative to a file, as they read from another folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.diagnostics import Span
from lora_fx.spec.evaluate import evaluate, no_environment
from lora_fx.spec.syntax import Model

if TYPE_CHECKING:
    from lora_fx.spec.spec import Spec


def moved_paths(spec: "Spec", folder: Path) -> dict[Span, str]:
    """Return what the paths of a spec become in a file in `folder`, where they change.

    By the span of the path of `model`, and of each attribute `weights`. Absolute paths stay, and
    so does what names nothing there: a hub id.
    """
    return {
        span: _from(folder, there)
        for span, named in _paths(spec)
        if (there := _named(named, span)) is not None and _home(span) != folder.resolve()
    }


def _paths(spec: "Spec") -> Iterator[tuple[Span, str]]:
    for statement in spec.syntax.statements:
        if isinstance(statement, Model):
            yield statement.path.span, statement.path.text
    for adapter in spec.adapters:
        setting = adapter.settings.get("weights")
        while setting is not None:
            yield setting.span, str(evaluate(setting.value, no_environment))
            setting = setting.over


def _home(span: Span) -> Path:
    return Path(span.source.name).parent.resolve()


def _named(named: str, span: Span) -> Path | None:
    there = _home(span) / named
    return None if Path(named).is_absolute() or not there.exists() else there


def _from(folder: Path, there: Path) -> str:
    return Path(os.path.relpath(there, folder.resolve())).as_posix()
