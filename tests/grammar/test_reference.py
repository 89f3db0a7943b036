"""The blocks of the reference are read and planned, and it leaves nothing out."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from torch import nn

import lora_fx
from lora_fx.adapters.not_yet import require_supported
from lora_fx.spec.attributes import ADAPTER, INITS, VARIANTS
from lora_fx.spec.blocks import COMPILE, ENTRY, LAYERS, MERGE, MODEL, OPTIMIZER, QUANTIZE, ROUTE
from lora_fx.spec.evaluate import FUNCTIONS
from lora_fx.spec.expressions import Value, show
from lora_fx.spec.json_form.schema import json_schema
from lora_fx.spec.recovery import KEYWORDS
from lora_fx.spec.scopes import EVERYWHERE, words_of
from tests.grammar.reference import BLOCKS, REFERENCE, model, rows, section

TABLES = (ADAPTER, MODEL, LAYERS, QUANTIZE, ROUTE, MERGE, OPTIMIZER, COMPILE, ENTRY)
WORDS = {
    *(name for table in TABLES for name in table),
    *(words_of(*TABLES).keys() | FUNCTIONS.keys() | KEYWORDS),
    *("class", "regex", "parameter", "linear", "except", "in", "layers", "where", "of", "base"),
}
DEFAULTS = [
    (name, rule.default)
    for table in TABLES
    for name, rule in table.items()
    if rule.default is not None and rule.default is not False
]
ARGUMENTS = [
    (word, name, rule.default)
    for words in (INITS, VARIANTS)
    for word, rules in words.items()
    for name, rule in rules.items()
]
ATTENTION = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
OWN_CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to where the files and adapters are that blocks refer to."""
    for name, block in BLOCKS:
        if name.endswith(".lora"):
            (tmp_path / name).write_text(block)
    for name in ("sql", "style", "english"):
        adapter = tmp_path / "adapters" / name
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text(json.dumps(OWN_CONFIG))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=range(len(BLOCKS)))
def test_blocks_are_planned(name: str, block: str) -> None:
    spec = lora_fx.parse(block)
    plan = lora_fx.plan(spec, model(name))
    assert bool(plan.sites) == bool(spec.adapters)
    assert all(note.severity == "note" and "?" in block for note in plan.notes)


def test_blocks_are_found() -> None:
    assert len(BLOCKS) > 25


@pytest.mark.parametrize("name", sorted(WORDS))
def test_every_word_is_explained(name: str) -> None:
    assert re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", REFERENCE)


@pytest.mark.parametrize("name", [name for name in EVERYWHERE if "." in name])
def test_every_name_with_a_dot_is_explained(name: str) -> None:
    assert f"`{name}`" in REFERENCE or f"`{name}.…`" in REFERENCE


@pytest.mark.parametrize(("name", "default"), DEFAULTS, ids=[name for name, _ in DEFAULTS])
def test_every_default_is_told(name: str, default: Value) -> None:
    shown = show(default).removesuffix(".0")
    told = [row[2].strip("` ") for row in rows(name) if len(row) > 2]
    assert any(cell.startswith(shown) for cell in told)


@pytest.mark.parametrize(("word", "name", "default"), ARGUMENTS)
def test_every_argument_is_told(word: str, name: str, default: Value | None) -> None:
    told = [cell for row in rows(word) for cell in row if re.search(rf"\b{name}\b", cell)]
    assert told
    if type(default) in (float, int) and default not in (1, 4):
        assert any(float(found) == default for found in re.findall(r"\((-?[\de.-]+)\)", told[-1]))
    elif default is not None and not isinstance(default, int | float):
        assert f"(`{show(default)}`)" in told[-1]


def test_the_json_form_is_read() -> None:
    (call,) = re.findall(r"```python\nspec = lora_fx\.parse\((.*?)\)\n```", REFERENCE, re.DOTALL)
    data = ast.literal_eval(call.strip())
    assert Draft202012Validator(json_schema()).is_valid(data)
    assert len(lora_fx.plan(lora_fx.parse(data), model("")).sites) == 7 * 32
    about = section("The JSON form")
    assert all(f'"{key}"' in about or f"`{key}`" in about for key in json_schema()["properties"])


def asked_for() -> Iterator[str]:
    """Specs that together ask for everything that the language can say."""
    target = "target q_proj"
    yield from (f"init = {word} {target}" for word in INITS)
    for word in VARIANTS:
        arguments = {"alora": "(tokens = [1])", "bdlora": '(a = ["q_proj"])'}.get(word, "")
        yield f"variant = {word}{arguments} {target}"
    yield f"lora_bias = true tie = true offload = true bias = all {target} train norm tokens [1]"
    yield 'target embed_tokens } layers { of = "model.layers" drop 1 share = nothing'
    yield f"{target} train norm tokens [1] }} route {{ train = true"
    yield f"variant = velora {target} }} route {{ train = true"
    yield f"{target} }} optimizer {{ lr = 1 }} merge m {{ from a"
    yield f"{target} }} merge m {{ from a into = base(dequantize = true)"
    yield f"{target} }} quantize linear {{ method = nf4"
    yield f"{target} }} compile {{ layout = augmented"
    entries = "entry train { batch = 1 sequence = 2 } entry forward { batch = 1 sequence = 2 }"
    yield f"{target} }} compile {{ {entries}"
    yield 'weights = "adapters/sql"'


@pytest.mark.usefixtures("folder")
def test_each_word_of_the_language_is_compiled() -> None:
    texts = [(f"lora 1 adapter a {{ rank = 2 {body} }}", "llama") for body in asked_for()]
    texts += [
        (
            'lora 1 adapter a { rank = 2 target parameter "**.down_proj" } route { default -> a }',
            "mixtral",
        ),
        ('lora 1 adapter a { rank = 2 target class "Conv2d" }', "vit"),
        ("lora 1 adapter a { rank = 2 target c_attn }", "gpt2"),
        ("lora 1 adapter a { bias = all target c_attn } route { train = true }", "gpt2"),
        ("lora 1 adapter a { rank = 2 target attention }", ATTENTION),
    ]
    for text, which in texts:
        require_supported(lora_fx.plan(text, model(which) if isinstance(which, str) else which))
