"""The tables kept in the cache folder, and what of Lark they rely on.

`memo_serialize` gives plain lists, dicts, texts and numbers; `Lark.load` takes them back as a
dict. The one is what `Lark.save` pickles, the other what `Lark.load` unpickles.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from lark import Lark, Tree, UnexpectedInput
from lark.grammar import Rule
from lark.lexer import TerminalDef

from lora_fx.spec import tables
from lora_fx.spec.grammar import grammar

FILES = sorted((Path(__file__).parent / "files").glob("*.lora"))
SMALL = 'start: "a" B*\nB: /b+/ | "c"\n'
OPTIONS = {"parser": "lalr"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_FX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(text: str = SMALL, **options: Any) -> str:
    """Write the tables of a grammar; the key under which they are."""
    key = tables.key(text, OPTIONS | options)
    tables.write(key, Lark(text, **OPTIONS | options))
    return key


def test_what_lark_gives_is_plain_data() -> None:
    data, memo = Lark(SMALL, parser="lalr").memo_serialize([TerminalDef, Rule])

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(type(k) in (str, int) and plain(v) for k, v in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (str, int, bool)

    assert plain(data)
    assert plain(memo)
    assert isinstance(Lark.load({"data": data, "memo": memo}), Lark)


def test_tables_come_back(folder: Path) -> None:
    parser = tables.read(kept())
    assert parser is not None
    assert parser.parse("abbc") == Lark(SMALL, parser="lalr").parse("abbc")
    assert tables.read(tables.key(SMALL + "\n", OPTIONS)) is None


def test_the_language_is_read_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = grammar.__wrapped__()
    monkeypatch.setattr("lora_fx.spec.grammar.Lark", None)
    loaded = grammar.__wrapped__()
    for text in (path.read_text() for path in FILES):
        trees = [parser.parse(text) for parser in (built, loaded)]
        assert trees[0] == trees[1]
        assert places(trees[0]) == places(trees[1])
        for end in range(0, len(text), 7):
            wrong = text[:end] + "\n@ = }"
            assert failure(built, wrong) == failure(loaded, wrong)


def places(tree: Tree[Any]) -> list[tuple[str, Any, Any]]:
    found = [(t.data, t.meta.start_pos, t.meta.end_pos) for t in tree.iter_subtrees() if t.children]
    return [*found, *((t.type, t.start_pos, t.end_pos) for t in tree.scan_values(bool))]


def failure(parser: Lark, text: str) -> Any:
    with pytest.raises(UnexpectedInput) as raised:
        parser.parse(text)
    error: Any = raised.value
    return error.pos_in_stream, error.interactive_parser.accepts()


def test_the_key_knows_all_that_tables_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [tables.key(SMALL, OPTIONS), tables.key(SMALL, {}), tables.key(SMALL + " ", OPTIONS)]
    monkeypatch.setattr("lark.__version__", "0.0")
    assert len({*keys, tables.key(SMALL, OPTIONS)}) == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "other", "binary"])
def test_damaged_tables_are_none(folder: Path, damage: str) -> None:
    key = kept()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "changed": whole.replace(b"Rule", b"rule", 1),
            "emptied": b"",
            "other": json.dumps({"a": 1}).encode(),
            "binary": b"\xff\n" + whole,
        }[damage]
    )
    assert tables.read(key) is None
    kept()
    assert tables.read(key) is not None


def test_without_a_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FX_CACHE", os.devnull)
    assert tables.read(kept()) is None


def test_a_write_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", refuse)
    assert tables.read(kept()) is None
    assert list(folder.iterdir()) == []


def test_the_folder_is_private_and_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORA_FX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    kept()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    kept()
    for folder in (tmp_path / "home" / ".cache" / "lora_fx", tmp_path / "xdg" / "lora_fx"):
        (file,) = folder.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
        assert file.stat().st_mode & 0o077 == 0
