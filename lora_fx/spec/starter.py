"""The text of a first `.lora` file: one adapter, and everything else to switch on as comments."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_fx.diagnostics import Source
from lora_fx.spec.expressions import quote
from lora_fx.spec.formatter import format_source

_RANK, _LOWER_RANK = 16, 8
_HEADROOM = 1.1


@dataclass(frozen=True)
class Shape:
    """Linear layers that are called alike and have one size, in how many layers of the model."""

    pattern: str
    in_features: int
    out_features: int
    count: int


@dataclass(frozen=True)
class Outline:
    """What a model is made of, as far as a first file depends on it.

    `stacks` are the numbers of layers, `names` the last names of the linear layers inside them,
    `narrowest` the smallest side of all, `head` the output head, `heads` the parts that are new
    for each task, `norm` the last norm, `experts` a pattern of stacked weights. `plain` says that
    all linear layers are `nn.Linear`, `tokens` that tokens are embedded.
    """

    kind: str
    parameters: int
    stacks: Mapping[str, int]
    shapes: Sequence[Shape]
    names: Sequence[str]
    narrowest: int
    head: str | None
    heads: Sequence[str]
    norm: str | None
    experts: str | None
    plain: bool
    tokens: bool


@dataclass(frozen=True)
class Choice:
    """Statements that stand in the file as a comment, under a line that says what for.

    `inside` the adapter, or beside it.
    """

    why: str
    code: Sequence[str]
    inside: bool = True


def starter_text(outline: Outline | None, model: str | None, share: float | None = None) -> str:
    """Return the file for a model, or one for any if there is none, in the canonical style.

    `model` is what the file's `model` names; `share` is the trained share of the parameters by the
    plan of this file, which sets the bound of its `check`.
    """
    lines = [
        *("lora 1", "", *_about(outline), ""),
        *(f"model {quote(model)}" if model else '# model "organisation/name"', ""),
        *("adapter default {", f"  rank = {_rank(_RANK, outline)}", "  alpha = 2 * rank"),
        *("  target linear", *_heads(outline)),
        *_commented((c for c in choices(outline) if c.inside), "  "),
        *("}", *_commented((c for c in choices(outline) if not c.inside), ""), ""),
        *(_check(share), ""),
        "compile { unit = layers }",
    ]
    return format_source(Source("starter", "\n".join(lines)))


def choices(outline: Outline | None) -> Iterator[Choice]:
    """Yield what a file for this model may say beside its beginning; each fits to it."""
    yield from _targets(outline)
    yield Choice("α/√r instead of α/r as the scale, for higher ranks", ["scaling = rslora"])
    yield Choice("DoRA: the magnitude of each output is learned too", ["variant = dora"])
    yield Choice("Dropout before A, in training", ["dropout = 5%"])
    trained = (outline.norm or outline.head) if outline else "norm"
    if trained is not None:
        code = [f"train {quote(trained) if outline else trained}"]
        yield Choice("A full copy of a module is trained too", code)
    if outline is None or outline.tokens:
        yield Choice("Rows of the input embedding are trained too, by token id", ["tokens [0, 1]"])
    yield from _beside(outline)


def _targets(outline: Outline | None) -> Iterator[Choice]:
    names = outline.names if outline else ("q_proj", "k_proj", "v_proj", "o_proj")
    if names:
        code = [f"target {', '.join(names)}"]
        yield Choice("The linear layers by name, in the place of `target linear`", code)
    if outline is not None and outline.experts:
        code = [f"target parameter {quote(outline.experts)}"]
        yield Choice("The experts too, whose weights are stacked", code)
    if (layers := _first_half(outline)) is not None:
        code = [f"target linear in layers{layers} {{ rank = {_rank(_LOWER_RANK, outline)} }}"]
        yield Choice("Lower ranks in the first layers", code)


def _beside(outline: Outline | None) -> Iterator[Choice]:
    other = [
        *("adapter other {", f"  rank = {_rank(_LOWER_RANK, outline)}", "  target linear"),
        *(*_heads(outline), "}"),
        *("route {", '  when "both" -> 0.7 * default + 0.3 * other', "  default -> base", "}"),
        *("merge sum {", "  from 0.7 * default + 0.3 * other", "}"),
    ]
    why = "Another adapter; each sample of a batch may have its own, or a mix; and both merged"
    yield Choice(why, other, inside=False)
    if outline is None or outline.plain:
        heads = ", ".join(map(quote, outline.heads if outline else ()))
        selector = f"linear except {heads}" if heads else "linear"
        method = "nf4(double_quant = true, compute_dtype = bfloat16)"
        code = [f"quantize {selector} {{ method = {method} }}"]
        yield Choice("The base in 4 bits (QLoRA)", code, inside=False)


def _first_half(outline: Outline | None) -> str | None:
    if outline is None:
        return "[..8]"
    if not outline.stacks:
        return None
    name, count = max(outline.stacks.items(), key=lambda stack: stack[1])
    of = f" of {quote(name)}" if len(outline.stacks) > 1 else ""
    return f"{of}[..{max(count // 2, 1)}]"


def _rank(rank: int, outline: Outline | None) -> str:
    if outline is not None and outline.narrowest < rank:
        return f"min({rank}, module.in_features, module.out_features)"
    return str(rank)


def _heads(outline: Outline | None) -> list[str]:
    heads = outline.heads if outline else ()
    return [f"  train {', '.join(map(quote, heads))}   # new for each task" for _ in heads[:1]]


def _check(share: float | None) -> str:
    """Bound the share from above with two digits and some room."""
    if share is None:
        return "check trainable <= 5%"
    wanted = 100 * share * _HEADROOM
    digits = 1 - math.floor(math.log10(wanted))
    bound = min(math.ceil(wanted * 10**digits) / 10**digits, 100.0)
    return f"check trainable <= {bound:.{max(digits, 0)}f}%"


def _about(outline: Outline | None) -> list[str]:
    if outline is None:
        return ["# A starter for any model; `lora-fx init --model PATH` writes one for yours."]
    stacks = ", ".join(f"{count} in {fqn}" for fqn, count in outline.stacks.items())
    return [
        f"# {outline.kind}, {outline.parameters:,} parameters.",
        f"# Layers: {stacks or 'no stack of them'}.",
        *("# Linear layers, with inputs, outputs and number:", "#"),
        *(f"#   {line}" for line in _table(outline)),
    ]


def _table(outline: Outline) -> Iterator[str]:
    rows = [
        (s.pattern, f"{s.in_features:,}", f"{s.out_features:,}", f"{s.count} ×")
        for s in outline.shapes
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        name, *numbers = row
        cells = (f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True))
        note = "   the output head: `linear` leaves it out" if name == outline.head else ""
        yield f"{name:<{widths[0]}}  {'  '.join(cells)}{note}"


def _commented(chosen: Iterable[Choice], indent: str) -> Iterator[str]:
    for choice in chosen:
        yield ""
        yield f"{indent}# {choice.why}:"
        for line in choice.code:
            yield f"{indent}# {line}"
