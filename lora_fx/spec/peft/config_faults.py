"""Settings of an `adapter_config.json` that are not what they must be."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What is wrong with the setting `key`."""

    key: str
    message: str


def malformed(config: Mapping[str, Any]) -> list[Fault]:
    """Return a fault for every setting whose value cannot be used, and what it must be."""
    wrong = [
        Fault(key, f"`{key} = {config[key]!r}` must be {wanted}")
        for key, (wanted, holds) in _SETTINGS.items()
        if key in config and not holds(config[key])
    ]
    return wrong or list(_contradictions(config))


def _contradictions(config: Mapping[str, Any]) -> Iterator[Fault]:
    for key in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.get("target_modules"), str) and config.get(key) is not None:
            yield Fault(key, f"`{key}` needs a list of names as `target_modules`, not a text")
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        yield Fault("layers_pattern", "`layers_pattern` says nothing without `layers_to_transform`")


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _index(value: Any) -> bool:
    return type(value) is int and value >= 0


def _truth(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _settings(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


def _patterns_to(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if value is None:
            return True
        return isinstance(value, dict) and all(_pattern(k) and holds(v) for k, v in value.items())

    return check


def _one_or_list(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value) or _list(value, holds)


def _list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


def _names(value: Any) -> bool:
    if isinstance(value, str):
        return _pattern(value)
    return value is None or _list(value, _name)


def _name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _saved(value: Any) -> bool:
    return value is None or _list(value, lambda name: _name(name) and _pattern(name))


def _ids(value: Any) -> bool:
    return _list(value, _index)


def _tokens(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_name(key) and _ids(ids) for key, ids in value.items())
    return value is None or _ids(value)


def _ranges(value: Any) -> bool:
    return value is None or _list(
        value, lambda pair: _list(pair, _index) and len(pair) == 2 and pair[0] < pair[1]
    )


_A_TRUTH = ("true or false", _truth)
_SUBCONFIG = ("an object with the method's settings", _settings)
_NAMES = ("a list of names", lambda value: value is None or _list(value, _name))
_SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number of 1 or more", _count),
    "rank_pattern": ("patterns with whole numbers of 1 or more", _patterns_to(_count)),
    "lora_alpha": ("a number", _number),
    "alpha_pattern": ("patterns with numbers", _patterns_to(_number)),
    "lora_dropout": ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
    "target_modules": ("a pattern or a list of names", _names),
    "exclude_modules": ("a pattern or a list of names", _names),
    "layers_to_transform": ("a layer index or a list of them", _one_or_list(_index)),
    "layers_pattern": ("a pattern or a list of them", _one_or_list(_pattern)),
    "layer_replication": ("a list of pairs [start, end]", _ranges),
    "target_parameters": _NAMES,
    "modules_to_save": ("a list of names", _saved),
    "trainable_token_indices": ("a list of token ids, or one for each of several names", _tokens),
    "task_type": ("a text", _text),
    "base_model_name_or_path": ("a text", _text),
    "revision": ("a text", _text),
    "bias": ("'none', 'all' or 'lora_only'", lambda v: v in (None, "none", "all", "lora_only")),
    "init_lora_weights": ("true, false or a text", lambda v: _truth(v) or _text(v)),
    "use_dora": _A_TRUTH,
    "lora_bias": _A_TRUTH,
    "ensure_weight_tying": _A_TRUTH,
    "alora_invocation_tokens": ("a list of token ids", lambda v: v is None or _ids(v)),
    "loftq_config": _SUBCONFIG,
    "eva_config": _SUBCONFIG,
    "corda_config": _SUBCONFIG,
    "lora_ga_config": _SUBCONFIG,
    "velora_config": _SUBCONFIG,
    "kasa_config": _SUBCONFIG,
    "monteclora_config": _SUBCONFIG,
    "use_bdlora": _SUBCONFIG,
}
