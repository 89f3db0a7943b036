"""What can be set, to which values, and what holds where nothing is set."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite

from lora_fx.diagnostics import Diagnostic, Span
from lora_fx.spec.closest import closest
from lora_fx.spec.expressions import Value, Word, show


@dataclass(frozen=True)
class Rule:
    """The values of one attribute: `words` are the bare words among them.

    `later` are words that the language has and this version does not.
    """

    expects: str
    default: Value | None
    accepts: Callable[[Value], bool]
    words: tuple[str, ...] = ()
    later: tuple[str, ...] = ()


def _whole(smallest: int) -> Callable[[Value], bool]:
    return lambda value: type(value) is int and value >= smallest


def _number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _one_of(*words: str) -> Callable[[Value], bool]:
    return lambda value: isinstance(value, Word) and value.name in words


def _share(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _truth(value: Value) -> bool:
    return isinstance(value, bool)


def _text(value: Value) -> bool:
    return isinstance(value, str) and bool(value)


def _words(words: tuple[str, ...], default: str | None, later: tuple[str, ...] = ()) -> Rule:
    return Rule(_listed(words), default and Word(default), _one_of(*words), words, later)


def _listed(words: tuple[str, ...]) -> str:
    return ", ".join(f"`{word}`" for word in words[:-1]) + f" or `{words[-1]}`"


DTYPES = ("float32", "bfloat16", "float16")
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_INITS = ("default", "gaussian", "random")
_LATER_INITS = ("pissa", "olora", "loftq", "orthogonal", "mica", "eva", "corda", "lora_ga")

ADAPTER: Mapping[str, Rule] = {
    "rank": Rule("a whole number of at least 1", 8, _whole(1)),
    "alpha": Rule("a finite number", 8, _number),
    "scaling": Rule(
        "`standard`, `rslora` or a number",
        Word("standard"),
        lambda value: _number(value) or _one_of("standard", "rslora")(value),
        ("standard", "rslora"),
    ),
    "dropout": Rule("a number from 0 to 1", 0, _share),
    "init": _words(_INITS, "default", _LATER_INITS),
    "seed": Rule("a whole number of at least 0", 0, _whole(0)),
    "dtype": _words(DTYPES, "float32"),
    "compute": _words(("activation", *DTYPES), "activation"),
    "trainable": Rule("`true` or `false`", True, _truth),
}
LATER_ADAPTER = ("variant", "bias", "lora_bias", "weights", "tie", "offload")

MODEL: Mapping[str, Rule] = {
    "dtype": _words(("auto", *DTYPES), None),
    "revision": Rule("a text", None, _text),
    "trust_remote_code": Rule("`true` or `false`", False, _truth),
}

COMPILE: Mapping[str, Rule] = {
    "mode": Rule(
        _listed(tuple(f'"{mode}"' for mode in _MODES)),
        "default",
        lambda value: isinstance(value, str) and value in _MODES,
    ),
    "dynamic": Rule("`true` or `false`", None, _truth),
    "unit": _words(("layers", "model"), "layers"),
    "checkpoint": _words(("none", "layers"), "none", ("budget",)),
}
LATER_COMPILE = ("layout",)


def words(*tables: Mapping[str, Rule]) -> tuple[str, ...]:
    """Return every bare word that is a value somewhere in these tables, later ones included."""
    rules = [rule for table in tables for rule in table.values()]
    return tuple(dict.fromkeys(word for rule in rules for word in rule.words + rule.later))


def problem(name: str, rule: Rule, value: Value, span: Span) -> Diagnostic | None:
    """Return what is wrong with a value of an attribute, if anything is."""
    if rule.accepts(value):
        return None
    if isinstance(value, Word) and value.name in rule.later:
        return Diagnostic("not-supported-yet", f"{name} `{value.name}` is not supported yet", span)
    help = None
    if isinstance(value, float) and rule.accepts(round(value)) and span.text != repr(value):
        help = f"write `round({span.text})`"
    if isinstance(value, Word | str):
        text = value.name if isinstance(value, Word) else value
        word = closest(text, rule.words)
        if word == text:
            help = f"write `{word}` without quotes"
        elif word is not None:
            help = f"did you mean `{word}`?"
    message = f"`{name}` must be {rule.expects}"
    return Diagnostic("wrong-value", message, span, f"is {show(value)}", help=help)
