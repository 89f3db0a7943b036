import pytest

from lora_fx.spec.patterns import BadPattern, glob_to_regex

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
    "pattern", ["", "a**", "**a", "a.**b.c", "***", "{a", "a}", "{a}}", "*" * 13]
)
def test_bad_globs(pattern: str) -> None:
    with pytest.raises(BadPattern):
        glob_to_regex(pattern)
