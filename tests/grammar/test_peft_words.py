"""What the reference says of PEFT is there in PEFT, and every setting of PEFT is in it."""

import dataclasses
import inspect
import re
from functools import cache

import peft
import pytest
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora import arrow, config

from tests.grammar.reference import columns, section

WORDS = sorted(
    {
        word
        for cell in columns("PEFT")
        for code in re.findall(r"`([^`]+)`", cell)
        for word in re.findall(r"[A-Za-z_]\w*", re.sub(r'"[^"]*"|\bTrue\b|\bFalse\b', "", code))
    }
)


@cache
def names() -> set[str]:
    """The names that PEFT gives settings, methods and their parameters."""
    configs = [value for name, value in vars(config).items() if name.endswith("Config")]
    functions = (
        peft.PeftModel.load_adapter,
        peft.LoraModel.add_weighted_adapter,
        peft.LoraModel._enable_peft_forward_hooks,
        create_loraplus_optimizer,
        create_lorafa_optimizer,
    )
    settings = {field.name for one in configs for field in dataclasses.fields(one)}
    words = {word for one in functions for word in re.findall(r"\w+", inspect.getsource(one))}
    return {
        "LoraConfig",
        *settings,
        *vars(arrow),
        *words,
        *dir(peft.PeftModel),
        *dir(peft.LoraModel),
    }


@pytest.mark.parametrize("word", WORDS)
def test_what_peft_calls_it_exists(word: str) -> None:
    assert word in names()


def test_the_words_are_found() -> None:
    assert len(WORDS) > 60
    assert "target_modules" in WORDS
    assert "no_such_setting" not in names()


def test_every_setting_of_peft_has_a_row() -> None:
    told = set(re.findall(r"`(\w+)`", section("From PEFT")))
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= told
