"""The language reference: its blocks are read, and it leaves nothing out."""

import logging
import re
from pathlib import Path

import pytest
from lark import Lark

import lora_fx
from lora_fx.spec.attributes import ADAPTER
from lora_fx.spec.blocks import COMPILE, ENTRY, LAYERS, MERGE, MODEL, OPTIMIZER, QUANTIZE, ROUTE
from lora_fx.spec.evaluate import FUNCTIONS
from lora_fx.spec.scopes import words_of

GRAMMAR = Path(__file__).parent.parent.parent / "grammar"
REFERENCE = (GRAMMAR / "README.md").read_text()
BLOCKS = re.findall(r"^```lora\n(.*?)^```", REFERENCE, re.MULTILINE | re.DOTALL)
TABLES = (ADAPTER, MODEL, LAYERS, QUANTIZE, ROUTE, MERGE, OPTIMIZER, COMPILE, ENTRY)
ATTRIBUTES = {name for table in TABLES for name in table}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_blocks_are_read(block: str) -> None:
    assert lora_fx.parse(block).source.text == block


def test_blocks_are_found() -> None:
    assert len(BLOCKS) > 10


@pytest.mark.parametrize("name", sorted({*ATTRIBUTES, *words_of(*TABLES), *FUNCTIONS}))
def test_every_word_is_explained(name: str) -> None:
    assert re.search(rf"\b{name}\b", REFERENCE)


def conflicts(grammar: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.DEBUG, logger="lark"):
        Lark(grammar, parser="lalr", debug=True)
    return [record.message for record in caplog.records if "onflict" in record.message]


def test_the_grammar_has_no_conflicts(caplog: pytest.LogCaptureFixture) -> None:
    assert conflicts((GRAMMAR / "lora.lark").read_text(), caplog) == []


def test_conflicts_would_be_seen(caplog: pytest.LogCaptureFixture) -> None:
    assert conflicts('start: "if" start | "if" start "else" start | "x"', caplog)
