"""The grammar is what it says it is: LALR(1), without conflicts."""

import logging

import pytest
from lark import Lark

from tests.grammar.reference import GRAMMAR


def conflicts(grammar: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.DEBUG, logger="lark"):
        Lark(grammar, parser="lalr", debug=True)
    return [record.message for record in caplog.records if "onflict" in record.message]


def test_the_grammar_has_no_conflicts(caplog: pytest.LogCaptureFixture) -> None:
    assert conflicts((GRAMMAR / "lora.lark").read_text(), caplog) == []


def test_conflicts_would_be_seen(caplog: pytest.LogCaptureFixture) -> None:
    assert conflicts('start: "if" start | "if" start "else" start | "x"', caplog)
