import subprocess
import sys
from pathlib import Path

import pytest

from lora_fx.diagnostics import LoraFxError
from lora_fx.spec import parse
from lora_fx.spec.expressions import Literal, Word
from lora_fx.spec.spec import CompileSpec, Spec

FILES = Path(__file__).parent / "files"


def read(body: str) -> Spec:
    return parse(f"lora 1\n{body}")


def faults(body: str) -> list[tuple[str, int]]:
    with pytest.raises(LoraFxError) as raised:
        read(body)
    return [(d.code, d.span.line if d.span else 0) for d in raised.value.diagnostics]


def test_a_small_file() -> None:
    spec = parse(FILES / "1_simple.lora")
    (adapter,) = spec.adapters
    (target,) = adapter.targets
    assert spec.path == FILES / "1_simple.lora"
    assert spec.model is not None
    assert spec.model.path == "meta-llama/Llama-3.2-1B"
    assert spec.model.dtype is None
    assert adapter.name == "default"
    assert {name: s.value.span.text for name, s in adapter.settings.items()} == {
        "rank": "16",
        "alpha": "32",
        "dropout": "0.05",
    }
    assert [(atom.kind, atom.pattern) for atom in target.selector.atoms] == [
        ("name", "q_proj"),
        ("name", "v_proj"),
    ]
    assert spec.compile == CompileSpec()
    assert spec.layers is None


def test_replication_and_checks() -> None:
    spec = parse(FILES / "4_solar.lora")
    assert spec.layers is not None
    assert [(r.start, r.end) for r in spec.layers.ranges] == [(0, 20), (10, 30)]
    assert [check.condition.span.text for check in spec.checks] == ["layer.count == 40"]
    ranges = read("layers { replicate ..3, 5, 7.. } adapter x { target linear }").layers
    assert ranges is not None
    assert [(r.start, r.end) for r in ranges.ranges] == [(None, 3), (5, 6), (7, None)]


def test_text_or_path(tmp_path: Path) -> None:
    path = tmp_path / "lora 1.lora"
    path.write_text("\ufefflora 1\r\nlet a = 1\r\n", encoding="utf-8")
    assert parse(path).path == path
    assert parse(str(path)).source.name == str(path)
    assert parse("lora 1").path is None
    assert parse("# a comment\nlora 1").source.name == "<text>"


@pytest.mark.parametrize("content", [None, b"lora 1 \xff"])
def test_unreadable_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.lora"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoraFxError) as raised:
        parse(path)
    (diagnostic,) = raised.value.diagnostics
    assert diagnostic.code == "unreadable-file"
    assert diagnostic.notes


def test_constants_and_words_are_put_in_place() -> None:
    spec = read(
        "adapter x { rank = half * 2  scaling = way  target q where module.in_features > size }\n"
        "let half = size / 2  let size = 16  let way = rslora"
    )
    settings = spec.adapters[0].settings
    assert settings["scaling"].value == Literal(Word("rslora"), settings["scaling"].value.span)
    (condition,) = spec.adapters[0].targets[0].selector.conditions
    assert "size" in condition.span.text


def test_presets_are_expanded_where_they_are_used() -> None:
    spec = read(
        "adapter x { rank = 1  use p  alpha = 2  target q { dropout = 0.5 } }\n"
        "preset p { rank = 3  alpha = 4  seed = 5 }"
    )
    settings = spec.adapters[0].settings
    values = {name: (s.value.span.text, s.origin) for name, s in settings.items()}
    assert values == {
        "rank": ("3", "preset p"),
        "alpha": ("2", "adapter x"),
        "seed": ("5", "preset p"),
    }
    assert spec.adapters[0].targets[0].settings["dropout"].origin == "target q"


def test_compile_and_model() -> None:
    spec = read(
        'let d = bfloat16 model "m" { dtype = d revision = "r" trust_remote_code = true }\n'
        'compile { unit = model mode = "max-autotune" dynamic = false checkpoint = layers }'
    )
    assert spec.model is not None
    assert (spec.model.dtype, spec.model.revision, spec.model.trust_remote_code) == (
        "bfloat16",
        "r",
        True,
    )
    found = spec.compile
    assert (found.unit, found.mode, found.dynamic, found.checkpoint) == (
        "model",
        "max-autotune",
        False,
        "layers",
    )


def test_all_mistakes_are_told_in_the_order_of_the_file() -> None:
    assert faults(
        "let a = b\nadapter x { rnk = 1 target q }\nadapter x { use p target q }\nlet c 1"
    ) == [
        ("unknown-name", 2),
        ("unknown-attribute", 3),
        ("duplicate-name", 4),
        ("syntax-error", 5),
    ]


def test_a_name_of_a_broken_statement_is_not_blamed() -> None:
    body = "let a = 1 +\nlet b = a\nadapter x { rank = a target q }"
    assert faults(body) == [("syntax-error", 3)]
    assert ("unknown-name", 3) in faults(body.replace("let a = 1 +", ""))


def test_a_constant_at_fault_is_told_once() -> None:
    body = "let a = 1 / 0\nlet b = a\nadapter x { rank = a + b target q }"
    assert faults(body) == [("division-by-zero", 2)]


def test_only_one_branch_may_be_wrong() -> None:
    assert faults("adapter x { rank = if layer.index < 3 then 0 else 8 target q }") == [
        ("wrong-value", 2)
    ]


def test_many_constants_in_a_row() -> None:
    chain = "\n".join(f"let a{i} = a{i + 1}" for i in range(2000))
    read(f"{chain}\nlet a2000 = 3")
    assert faults(f"{chain}\nlet a2000 = a0") == [("cyclic-value", 2)]


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys, lora_fx; lora_fx.parse('lora 1\\nadapter x { target q }');"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FILES.parent.parent.parent)


def test_a_mistake_that_is_understood_hides_no_other() -> None:
    assert faults("adapter x {\nrank 3\nalpha = 2 * rnak\nuse missing\ntarget linear }") == [
        ("syntax-error", 3),
        ("unknown-name", 4),
        ("unknown-preset", 5),
    ]


def test_what_refers_to_a_part_that_could_not_be_read_is_not_to_blame() -> None:
    text = "preset p { rank = = 3 }\nlet a = = 3\nadapter x { use p  rank = a  target linear }"
    assert faults(text) == [("syntax-error", 2), ("syntax-error", 3)]
