"""Which names a PEFT config means; the rules are PEFT's documented ones."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

Config = Mapping[str, Any]

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def targets(config: Config, modules: Iterable[str], linears: frozenset[str]) -> set[str]:
    """Return the fqns that `target_modules` adapts, of all module fqns of the base model.

    `linears` are the linear layers but the output head, which is what `all-linear` means.
    """
    wanted = config.get("target_modules") or ()
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        chosen = set(linears)
    elif isinstance(wanted, str):
        chosen = {fqn for fqn in modules if re.fullmatch(wanted, fqn)}
    else:
        chosen = {
            fqn
            for fqn in modules
            if fqn in wanted or (ends_with(fqn, wanted) and _in_layers(config, fqn))
        }
    return {fqn for fqn in chosen if not _excluded(config, fqn)}


def parameters(config: Config, names: Iterable[str]) -> set[str]:
    """Return the parameters that `target_parameters` adapts, of all names of parameters."""
    wanted = config.get("target_parameters") or ()
    return {name for name in names if ends_with(name, wanted)}


def trained(suffix: str, modules: Iterable[str]) -> set[str]:
    """Return the fqns that an entry of `modules_to_save` trains: with no regard to dots."""
    return {fqn for fqn in modules if fqn.endswith(suffix)}


def saved_modules(config: Config) -> list[str]:
    """Return the entries of `modules_to_save`, and the heads that PEFT adds for the task."""
    heads = _HEADS.get(config.get("task_type") or "", ())
    return list(dict.fromkeys([*(config.get("modules_to_save") or ()), *heads]))


def fits(pattern: str, fqn: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` is about a module or parameter."""
    return re.match(rf"(.*\.)?({pattern})$", fqn) is not None


def first_fitting(patterns: Mapping[str, Any] | None, fqn: str, otherwise: Any) -> Any:
    """Return the value of the first key that is about a module, else `otherwise`."""
    return next((value for key, value in (patterns or {}).items() if fits(key, fqn)), otherwise)


def ends_with(fqn: str, suffixes: Iterable[str]) -> bool:
    """Whether a dotted name is one of these, or ends with a dot and one of these."""
    return any(fqn == suffix or fqn.endswith(f".{suffix}") for suffix in suffixes)


def _excluded(config: Config, fqn: str) -> bool:
    excluded = config.get("exclude_modules") or ()
    if any(re.match(rf"(^|.*\.){name}($|\..*)", fqn) for name in saved_modules(config)):
        return True
    if isinstance(excluded, str):
        return re.fullmatch(excluded, fqn) is not None
    return ends_with(fqn, excluded)


def _in_layers(config: Config, fqn: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    index = _layer_index(config.get("layers_pattern"), fqn)
    return index == wanted if isinstance(wanted, int) else index in wanted


def _layer_index(patterns: str | list[str] | None, fqn: str) -> int | None:
    """Read the number after the stack's name; without patterns any name inside another will do."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", fqn)
        return int(found[1]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", fqn)
        if found:
            return int(found["idx"])
    return None
