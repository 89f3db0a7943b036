"""What was taken over from PEFT as data is what the installed PEFT has."""

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.transformers_weight_conversion import (
    _MODEL_TO_CONVERSION_PATTERN,
    _MOE_FUSED_TARGETS,
    _MOE_TARGET_MODULE_MAPPING,
)
from transformers import CONFIG_MAPPING

from lora_fx.spec.peft import moe
from lora_fx.spec.peft.default_targets import DEFAULT_TARGETS


def test_default_targets() -> None:
    assert DEFAULT_TARGETS == TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def test_names_of_experts() -> None:
    assert moe._NEW_NAMES == _MOE_TARGET_MODULE_MAPPING
    for old, fused in _MOE_FUSED_TARGETS.items():
        names = [name for name, new in moe._NEW_NAMES[old].items() if new == moe._FUSED]
        assert fused == {moe._FUSED: names}


def test_model_types_with_stacked_experts() -> None:
    known = {kind for kind in _MODEL_TO_CONVERSION_PATTERN if kind in CONFIG_MAPPING}
    for old, types in moe.STACKED.items():
        theirs = {kind for kind in known if _MODEL_TO_CONVERSION_PATTERN[kind] == old}
        assert theirs <= set(types)
        assert not set(types) & (known - theirs)
