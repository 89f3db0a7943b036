"""Settings of an `adapter_config.json` that are not what they must be."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any


def malformed(config: Mapping[str, Any]) -> list[str]:
    """Name every setting whose value cannot be used, as `key = value`, and what it must be."""
    faults = []
    for key, (wanted, holds) in _SETTINGS.items():
        if key in config and not holds(config[key]):
            faults.append(f"`{key} = {config[key]!r}` must be {wanted}")
    return faults


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _index(value: Any) -> bool:
    return type(value) is int and value >= 0


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
    return value is None or _list(value, lambda name: isinstance(name, str))


def _ranges(value: Any) -> bool:
    return value is None or _list(
        value, lambda pair: _list(pair, _index) and len(pair) == 2 and pair[0] < pair[1]
    )


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
}
