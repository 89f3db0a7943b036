"""A spec in one file."""

from collections.abc import Mapping
from pathlib import Path

from lora_fx.diagnostics import Source, Span
from lora_fx.spec.formatter import format_source
from lora_fx.spec.json_form.read import json_to_text
from lora_fx.spec.json_form.write import file_to_json
from lora_fx.spec.moved import moved_paths
from lora_fx.spec.parser import parse_source
from lora_fx.spec.spec import Spec
from lora_fx.spec.syntax import Include


def flat_text(spec: Spec, folder: Path, named: Mapping[Span, str] | None = None) -> str:
    """Return the text of a file in `folder` that means what the spec means.

    It is the spec's own text, if that includes no files and names no paths that are relative to
    another folder; else one made anew, with the statements of included files in place. `named` are
    other paths to write there, by the span of the one that stands in the spec.
    """
    paths = moved_paths(spec, folder) | dict(named or {})
    file, _ = parse_source(spec.source)
    whole = file is not None and not any(isinstance(one, Include) for one in file.statements)
    if whole and not paths:
        return spec.source.text
    text = json_to_text(file_to_json(spec.syntax, paths))
    return format_source(Source(spec.source.name, text))
