from typing import Literal

import pytest

from lora_fx.diagnostics import Source, Span
from lora_fx.spec.patterns import BadPattern, glob_to_regex, matcher
from lora_fx.spec.selectors import Atom

NAMES = [
    "lm_head",
    "model",
    "model.layers",
    "model.layers.0",
    "model.layers.0.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.12.mlp.up_proj",
    "model.layers.12.mlp.down_proj",
]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("lm_head", ["lm_head"]),
        ("q_proj", []),
        ("*", ["lm_head", "model"]),
        ("model.*", ["model.layers"]),
        ("model.layers.*", ["model.layers.0"]),
        ("model.layers.*.q_proj", ["model.layers.0.q_proj"]),
        ("**.q_proj", ["model.layers.0.q_proj"]),
        ("model.**.q_proj", ["model.layers.0.q_proj"]),
        ("model.layers.**.layers", []),
        ("model.**.layers", ["model.layers"]),
        ("**", NAMES),
        ("model.layers.12.**", ["model.layers.12.mlp.up_proj", "model.layers.12.mlp.down_proj"]),
        ("model.layers.1*.mlp.up_proj", ["model.layers.12.mlp.up_proj"]),
        ("model.layers.*.mlp.*_proj", NAMES[5:]),
        ("**.{up,down}_proj", NAMES[5:]),
        ("model.layers.0.{q_proj,mlp.up_proj}", NAMES[4:6]),
        ("model.layers.{0,1{2,3}}.**.{up_proj,q_proj}", NAMES[4:7]),
        ("{lm_head,model.**}", [NAMES[0], *NAMES[2:]]),
        ("model.layers.0.q.proj", []),
        ("model.layers.0.q_pro.", []),
    ],
)
def test_globs(pattern: str, matched: list[str]) -> None:
    regex = glob_to_regex(pattern)
    assert [name for name in NAMES if regex.fullmatch(name)] == matched


@pytest.mark.parametrize(
    "pattern", ["", "a**", "**a", "a.**b.c", "***", "{a", "a}", "{a}}", "*" * 13, "{" * 9 + "}" * 9]
)
def test_bad_globs(pattern: str) -> None:
    with pytest.raises(BadPattern):
        glob_to_regex(pattern)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("regex", "(((a{900}){900}){900})"),
        ("regex", "a{2,1000000}"),
        ("regex", "(" * 50_000 + ")" * 50_000),
        ("glob", "{" * 50_000 + "}" * 50_000),
    ],
    ids=lambda value: value[:12],
)
def test_what_would_take_all_memory_is_refused(
    kind: Literal["regex", "glob"], pattern: str
) -> None:
    with pytest.raises(BadPattern):
        matcher(Atom(kind, pattern, Span(Source("x", pattern), 0, 1)))


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("regex", "(a|aa)*b"), ("glob", "{,a,aa}" * 60 + "b")],
    ids=["regex", "glob"],
)
def test_what_would_take_years_is_refused(kind: Literal["regex", "glob"], pattern: str) -> None:
    fits = matcher(Atom(kind, pattern, Span(Source("x", pattern), 0, 1)))
    with pytest.raises(BadPattern, match="takes more than 1 s"):
        fits("a" * 60 + "bc")
