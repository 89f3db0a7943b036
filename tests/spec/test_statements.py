"""What the statements about more than one module mean; the files are those of the design."""

from pathlib import Path
from typing import Any

import pytest

from lora_fx.diagnostics import LoraFxError
from lora_fx.spec import parse
from lora_fx.spec.attributes import ADAPTER
from lora_fx.spec.evaluate import evaluate, no_environment
from lora_fx.spec.expressions import Word
from lora_fx.spec.rule import completed
from lora_fx.spec.spec import Mix, Spec

EVA = {
    **{"rho": 2.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100},
    **{"whiten": False, "adjust_scaling_factors": True},
}
FILES = Path(__file__).parent / "files"


def read(text: str) -> Spec:
    return parse(f"lora 1\nadapter a {{ target linear }}\nadapter b {{ target linear }}\n{text}")


def terms(mix: Mix | None) -> dict[str, float] | None:
    return None if mix is None else {term.name: term.weight for term in mix.terms}


def test_quantisation_and_optimizer() -> None:
    spec = parse(FILES / "2_qlora.lora")
    assert spec.model is not None
    assert spec.model.dtype == "bfloat16"
    (quantize,) = spec.quantize
    double = (("double_quant", True), ("compute_dtype", Word("bfloat16")))
    assert (quantize.method, quantize.storage) == (Word("nf4", double), "bfloat16")
    assert [str(atom) for atom in quantize.selector.excludes] == ["lm_head"]
    optimizer = spec.optimizer
    assert optimizer is not None
    assert (optimizer.name, optimizer.lr, optimizer.loraplus_ratio) == ("adamw8bit", 2e-4, 16)
    assert (optimizer.weight_decay, optimizer.embedding_lr, optimizer.betas) == (0, None, None)


def test_defaults_of_quantisation() -> None:
    spec = read("quantize linear { method = int8 }\nquantize up_proj { method = fp4 }")
    assert [q.method.name for q in spec.quantize] == ["int8", "fp4"]
    assert spec.quantize[0].method.argument("threshold") == 6.0
    assert spec.quantize[1].method.argument("double_quant") is False
    assert spec.quantize[1].storage == "uint8"


def test_what_an_adapter_trains_of_the_base() -> None:
    (adapter,) = parse(FILES / "3_mixed.lora").adapters
    assert [str(atom) for atom in adapter.trains[0].selector.atoms] == ['"model.norm"']
    (tokens,) = adapter.tokens
    assert (tokens.ids, str(tokens.atom)) == ((0, 1, 2), "embed_tokens")
    assert [target.optional for target in adapter.targets] == [False, False, False, True]
    assert str(adapter.targets[3].selector.atoms[0]) == 'parameter "**.experts.down_proj"'


def test_layers() -> None:
    layers = read('layers { replicate ..8, 4.. drop 5, 6..7 of = "x.y" share = nothing }').layers
    assert layers is not None
    assert [(r.start, r.end) for r in layers.ranges] == [(None, 8), (4, None)]
    assert [(r.start, r.end) for r in layers.dropped] == [(5, 6), (6, 7)]
    assert (layers.stack, layers.share) == ("x.y", False)


def test_route() -> None:
    spec = parse(FILES / "5_route.lora")
    assert [adapter.name for adapter in spec.adapters] == ["default", "sql", "legal", "style"]
    route = spec.route
    assert route is not None
    assert (route.argument, route.slots, route.max_rank) == ("adapter_names", 8, 64)
    assert {name: terms(mix) for name, mix in route.mixes.items()} == {
        "counsel": {"legal": 0.7, "style": 0.3}
    }
    assert terms(route.default) == {}
    assert [(e.name, e.batch, e.sequence) for e in spec.compile.entries] == [
        ("train", 8, 2048),
        ("generate", 32, 1024),
    ]
    assert (spec.compile.dynamic, spec.compile.checkpoint) == (True, "none")


def test_defaults_of_a_route() -> None:
    route = read("route { }").route
    assert route is not None
    assert (route.argument, route.slots, route.max_rank) == ("adapter_names", None, None)
    assert (route.train, route.mixes, route.default) == (False, {}, None)


@pytest.mark.parametrize(
    ("mix", "weights"),
    [
        ("a", {"a": 1.0}),
        ("- a", {"a": -1.0}),
        ("0.7 * a - 30% * b", {"a": 0.7, "b": -0.3}),
        ("half * a + (1 - half) * b", {"a": 0.25, "b": 0.75}),
        ('- (2 / 4) * "a"', {"a": -0.5}),
    ],
)
def test_mixes(mix: str, weights: dict[str, float]) -> None:
    spec = read(f'let half = 0.25\nroute {{ when "x" -> {mix} }}\nmerge m {{ from {mix} }}')
    assert spec.route is not None
    assert terms(spec.route.mixes["x"]) == pytest.approx(weights)
    assert terms(spec.merges[0].mix) == pytest.approx(weights)


def test_merges_come_after_what_they_take_from() -> None:
    both, production = parse(FILES / "6_merge.lora").merges
    density = (("density", 0.5), ("sign", Word("total")))
    assert (both.name, both.method, both.rank) == ("both", Word("ties", density), 32)
    assert (both.save, both.into_base) == ("out/both", False)
    assert (production.into_base, production.dequantize) == (True, False)
    spec = read("merge last { from first + b }\nmerge first { from a }")
    assert [merge.name for merge in spec.merges] == ["first", "last"]
    folded = read("merge x { from a  into = base(dequantize = true)  dtype = float16 }").merges[0]
    assert (folded.dequantize, folded.dtype, folded.method) == (True, "float16", Word("cat"))


def test_compile() -> None:
    text = "compile { checkpoint = budget(25%)  layout = plain  unit = layers }"
    compile = read(text).compile
    assert (compile.checkpoint, compile.budget, compile.layout) == ("budget", 0.25, "plain")


@pytest.mark.parametrize(
    ("attribute", "value", "arguments"),
    [
        ("init", "pissa", {}),
        ("init", "pissa(16)", {"iterations": 16}),
        ("init", "loftq(iterations = 3)", {"bits": 4, "iterations": 3}),
        ("init", "loftq(8)", {"bits": 8, "iterations": 1}),
        (
            "init",
            "corda(method = kpm)",
            {"method": Word("kpm"), "use_float16_for_covariance": False},
        ),
        ("variant", "alora(tokens = [4, 5])", {"tokens": (4, 5)}),
        ("variant", "kasa", {"beta": 1e-4, "gamma": 1e-3}),
        ("variant", 'bdlora(a = ["q"], blocks = 2)', {"a": ("q",), "blocks": 2, "strict": True}),
    ],
)
def test_words_with_arguments_are_completed_when_planned(
    attribute: str, value: str, arguments: dict[str, Any]
) -> None:
    spec = read(f"adapter c {{ {attribute} = {value}  target linear }}")
    written = evaluate(spec.adapters[2].settings[attribute].value, no_environment)
    word = completed(ADAPTER[attribute], written)
    assert isinstance(word, Word)
    assert dict(word.arguments) == arguments


def test_settings_remember_what_they_override() -> None:
    text = "preset p { rank = 2 }\nadapter c { rank = 3  use p  rank = 4  target linear }"
    with pytest.raises(LoraFxError):
        read(text)  # twice in one block
    spec = read("preset p { rank = 2 }\nadapter c { rank = 3  use p  target linear }")
    rank = spec.adapters[2].settings["rank"]
    assert rank.origin == "preset p"
    assert rank.over is not None
    assert rank.over.origin == "adapter c"


def test_regular_expressions_are_bounded() -> None:
    with pytest.raises(LoraFxError) as raised:
        read('adapter c { target regex "(" }')
    assert [d.code for d in raised.value.diagnostics] == ["bad-pattern"]
