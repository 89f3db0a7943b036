"""The rules on names against PEFT's own functions, on generated configs."""

import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_fx.spec.peft.matching import first_fitting, targets

NAMES = [
    f"{before}{layer}{name}"
    for before in ("", "model.", "model.encoder.")
    for layer in ("", "layers.0.", "layers.11.", "h.1.", "layers.1.experts.0.")
    for name in ("q_proj", "attn.q_proj", "head", "lm_head", "head.dense", "gate")
]
ENDS = ["q_proj", "attn.q_proj", "head", "lm_head", "gate", "layers.0.q_proj", "model.head", "proj"]
REGEXES = [r".*q_proj", r"model\..*", r".*\.1\..*", r"head", r".*layers\.[01]+\.attn.*", "(?i)HEAD"]
ends = st.lists(st.sampled_from(ENDS), min_size=1, max_size=3, unique=True)
optional_ends = st.none() | ends


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    config: dict[str, Any] = {
        "target_modules": draw(ends | st.sampled_from(REGEXES)),
        "exclude_modules": draw(optional_ends | st.sampled_from(REGEXES)),
        "modules_to_save": draw(optional_ends),
    }
    if isinstance(config["target_modules"], list):
        indices = st.sampled_from([0, 1, 11])
        config["layers_to_transform"] = draw(st.none() | indices | st.lists(indices))
        if config["layers_to_transform"] is not None:
            patterns = st.sampled_from(["layers", "h", "encoder.layers", "experts"])
            config["layers_pattern"] = draw(st.none() | patterns | st.lists(patterns))
    return config


@given(configs())
def test_targets(config: dict[str, Any]) -> None:
    theirs = LoraConfig(**config)
    wanted = {name for name in NAMES if check_target_module_exists(theirs, name)}
    assert targets(config, NAMES, frozenset()) == wanted


keys = st.sampled_from([*ENDS, r"layers\.\d+\.attn\.q_proj", "^head", ".*", "q_proj|gate"])


@given(st.dictionaries(keys, st.integers(), max_size=5), st.sampled_from(NAMES))
def test_the_first_pattern_that_fits(patterns: dict[str, int], name: str) -> None:
    wanted = patterns.get(get_pattern_key(list(patterns), name), 8)
    assert first_fitting(patterns, name, 8) == wanted


def test_the_names_tell_the_rules_apart() -> None:
    found = [targets({"target_modules": [end]}, NAMES, frozenset()) for end in ENDS]
    assert len({frozenset(names) for names in found}) == len(ENDS)
    assert all(re.compile(regex) for regex in REGEXES)
