"""What must hold of the formatter, whatever the text."""

import re
from typing import Any

from lark import Token, Tree

from lora_fx.diagnostics import Source
from lora_fx.spec.formatter import format_source
from lora_fx.spec.grammar import grammar


def formatted(text: str) -> str:
    return format_source(Source("x.lora", text))


def tree(text: str) -> list[tuple[str, int]]:
    """The syntax tree without places: rules with their numbers of children, and tokens."""
    flat: list[tuple[str, int]] = []
    waiting: list[Tree[Any] | Token] = [grammar().parse(text)]
    while waiting:
        node = waiting.pop()
        children = node.children if isinstance(node, Tree) else []
        flat.append((str(node.data) if isinstance(node, Tree) else str(node), len(children)))
        waiting += children
    return flat


def comments(text: str) -> list[str]:
    found = re.findall(r'"(?:\\.|[^"\\\n])*"|#[^\n]*', text)
    return [part.rstrip() for part in found if part[0] == "#"]


def check(text: str) -> str:
    """What must hold of every text that can be read."""
    once = formatted(text)
    assert tree(once) == tree(text)
    assert comments(once) == comments(text)
    assert formatted(once) == once
    assert not re.search(r"[ \t]\n|\n\n\n|\n\n\Z|\A\n|[^\n]\Z", once)
    return once
