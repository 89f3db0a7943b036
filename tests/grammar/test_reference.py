"""The language reference: its blocks are read, and it leaves nothing out."""

import logging
import re
from pathlib import Path

import pytest
from lark import Lark

import lora_fx
from lora_fx.diagnostics import LoraFxError
from lora_fx.spec.attributes import ADAPTER, COMPILE, LATER_ADAPTER, LATER_COMPILE, MODEL, words
from lora_fx.spec.names import FUNCTIONS

GRAMMAR = Path(__file__).parent.parent.parent / "grammar"
REFERENCE = (GRAMMAR / "README.md").read_text()
BLOCKS = re.findall(r"^```lora\n(.*?)^```", REFERENCE, re.MULTILINE | re.DOTALL)
LATER = REFERENCE.partition("## Not yet")[2]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_blocks_are_read(block: str) -> None:
    assert lora_fx.parse(block).source.text == block


def test_blocks_are_found() -> None:
    assert len(BLOCKS) > 10


@pytest.mark.parametrize("name", [*ADAPTER, *MODEL, *COMPILE, *words(ADAPTER, MODEL), *FUNCTIONS])
def test_every_word_is_explained(name: str) -> None:
    assert re.search(rf"\b{name}\b", REFERENCE)


@pytest.mark.parametrize("name", [*LATER_ADAPTER, *LATER_COMPILE])
def test_what_is_refused_is_listed(name: str) -> None:
    assert f"`{name}`" in LATER


def test_every_listed_statement_is_refused() -> None:
    examples = {
        "include": 'include "a.lora"',
        "quantize": "quantize linear { method = int8 }",
        "route": "route { slots = 3 }",
        "merge": "merge both { from 1.0 * a }",
        "optimizer": "optimizer { lr = 1 }",
        "train": "adapter a { train head }",
        "tokens": "adapter a { tokens [1] }",
    }
    for name, text in examples.items():
        assert f"`{name}`" in LATER
        with pytest.raises(LoraFxError) as raised:
            lora_fx.parse(f"lora 1\n{text}")
        assert [d.message for d in raised.value.diagnostics] == [f"`{name}` is not supported yet"]


def conflicts(grammar: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.DEBUG, logger="lark"):
        Lark(grammar, parser="lalr", debug=True)
    return [record.message for record in caplog.records if "onflict" in record.message]


def test_the_grammar_has_no_conflicts(caplog: pytest.LogCaptureFixture) -> None:
    assert conflicts((GRAMMAR / "lora.lark").read_text(), caplog) == []


def test_conflicts_would_be_seen(caplog: pytest.LogCaptureFixture) -> None:
    assert conflicts('start: "if" start | "if" start "else" start | "x"', caplog)
