"""What is said of other tools' words is the language: each example is read, in its place."""

import dataclasses
import re

import peft
import pytest

import lora_fx
from lora_fx.diagnostics import LoraFxError
from lora_fx.spec.attributes import ADAPTER
from lora_fx.spec.blocks import MERGE, MODEL, OPTIMIZER
from lora_fx.spec.grammar import grammar
from lora_fx.spec.other_words import _SETTINGS, is_selector, other_setting, other_value
from lora_fx.spec.peft.unsupported import _SAID

OURS = {*ADAPTER, *MODEL, *MERGE, *OPTIMIZER}
WHOLE = ("model", "layers", "quantize", "route", "optimizer", "compile")
OF_MERGES = ("from", "method", "rank = svd")


def in_its_place(example: str) -> str:
    rest = "adapter one { target linear } adapter other { target linear }"
    if example.startswith(WHOLE):
        return f"lora 1 {rest} {example}"
    if example.startswith(OF_MERGES):
        source = "" if example.startswith("from") else "from one + other"
        return f"lora 1 {rest} merge both {{ {source} {example} }}"
    return f"lora 1 adapter x {{ target linear {example} }}"


@pytest.mark.parametrize("name", _SETTINGS)
def test_the_example_is_read(name: str) -> None:
    lora_fx.parse(in_its_place(_SETTINGS[name]))


@pytest.mark.parametrize("name", _SETTINGS)
def test_the_word_is_none_of_this_language(name: str) -> None:
    assert name not in OURS
    with pytest.raises(LoraFxError, match=re.escape(_SETTINGS[name])):
        lora_fx.parse(f"lora 1 adapter x {{ target linear {name} = 1 }}")


def test_every_setting_of_peft_is_the_same_here_or_has_an_example() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)} & {*_SAID}
    assert len(fields) > 25
    unsaid = {name for name in fields - OURS if other_setting(name) is None}
    assert unsaid == set()
    assert other_setting("megatron_config") is None


@pytest.mark.parametrize("name", ["target_modules", "modules_to_save", "trainable_token_indices"])
def test_what_names_modules_is_no_adapter_without_targets(name: str) -> None:
    assert is_selector(name)
    with pytest.raises(LoraFxError) as raised:
        lora_fx.parse(f"lora 1 adapter x {{ {name} = [1] }}")
    assert [d.code for d in raised.value.diagnostics] == ["unknown-attribute"]
    with pytest.raises(LoraFxError, match="adapts nothing"):
        lora_fx.parse("lora 1 adapter x { lora_alpha = 1 }")


@pytest.mark.parametrize(
    ("attribute", "written", "ours"),
    [
        ("dtype", "fp32", "float32"),
        ("dtype", "BF16", "bfloat16"),
        ("dtype", "torch.float16", "float16"),
        ("compute", "half", "float16"),
        ("lora_bias", "True", "true"),
        ("init", "pissa_niter_16", "pissa(iterations = 16)"),
        ("variant", "DoRA", "dora"),
        ("init", "GAUSSIAN", "gaussian"),
    ],
)
def test_values(attribute: str, written: str, ours: str) -> None:
    for value in (written, f'"{written}"'):
        with pytest.raises(LoraFxError) as raised:
            lora_fx.parse(f"lora 1 adapter x {{ target linear {attribute} = {value} }}")
        (diagnostic,) = raised.value.diagnostics
        assert f"`{ours}`" in str(diagnostic.help)
    lora_fx.parse(f"lora 1 adapter x {{ target linear {attribute} = {ours} }}")


def test_a_value_is_only_said_where_it_is_one() -> None:
    assert other_value("fp32") == "float32"
    with pytest.raises(LoraFxError, match="must be a whole number of at least 1"):
        lora_fx.parse("lora 1 adapter x { target linear rank = fp32 }")


def test_a_number_and_a_truth_in_quotes() -> None:
    with pytest.raises(LoraFxError) as raised:
        lora_fx.parse('lora 1 adapter x { target linear alpha = "32" tie = "true" rank = "many" }')
    helps = [diagnostic.help for diagnostic in raised.value.diagnostics]
    assert helps == ["write `32` without quotes", "write `true` without quotes", None]


def test_a_text_without_quotes() -> None:
    with pytest.raises(LoraFxError) as raised:
        lora_fx.parse('lora 1 model "a/b" { revision = main } compile { mode = default }')
    helps = [diagnostic.help for diagnostic in raised.value.diagnostics]
    assert helps == [f'texts stand in double quotes: `"{text}"`' for text in ("main", "default")]


def test_the_words_of_the_attribute_before_those_of_others() -> None:
    with pytest.raises(LoraFxError, match="`dtype` must be `float32`, `bfloat16` or `float16`"):
        lora_fx.parse("lora 1 adapter x { target linear dtype = gausian }")


def test_grammar_knows_no_other_tools_words() -> None:
    words = {terminal.name.lower() for terminal in grammar().terminals}
    assert words & _SETTINGS.keys() == set()
