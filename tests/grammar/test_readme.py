"""The project's README: its `.lora` files are read, its commands are there."""

import re
from pathlib import Path

import pytest

import lora_fx
from lora_fx.cli import COMMANDS

README = (Path(__file__).parents[2] / "README.md").read_text()
FILES = re.findall(r"^```lora\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_files_are_read(text: str) -> None:
    assert lora_fx.parse(text).adapters


def test_every_command_is_told_and_no_other() -> None:
    told = set(re.findall(r"\blora-fx ([a-z]+)", README))
    assert told == set(COMMANDS)
