"""Random `.lora` programs that can be read, as text: the whole grammar, whatever they mean."""

from collections.abc import Callable, Sequence

from hypothesis import strategies as st

from lora_fx.spec.grammar import grammar

Text = st.SearchStrategy[str]
_some = st.sampled_from


def _list(items: Text, most: int = 3, between: str = ", ") -> Text:
    return st.lists(items, min_size=1, max_size=most).map(between.join)


def _maybe(text: Text, otherwise: str = "") -> Text:
    return st.one_of(st.just(otherwise), text)


def _phrase(*parts: Text | str) -> Text:
    strategies = [st.just(part) if isinstance(part, str) else part for part in parts]
    return st.tuples(*strategies).map(lambda words: " ".join(word for word in words if word))


_names = st.one_of(
    _some(["a", "q_proj", "up_proj", "rank", "_", "x1", "adapter_with_a_long_name"]),
    st.from_regex(r"[a-z_][a-z0-9_]{0,5}x", fullmatch=True),
)
_texts = st.lists(
    _some(
        [*'aé#{};=,.*->[]() \t"模', "\\\\", '\\"', "\\n", "**.", "model.layers.0", "\x0b", "\u2028"]
    ),
    max_size=6,
).map(lambda parts: '"' + "".join('\\"' if part == '"' else part for part in parts) + '"')
_whole = st.one_of(st.integers(0, 64).map(str), _some(["007", "1" * 30]))
_numbers = st.one_of(_whole, _some(["0.05", "2e-4", "1.5E+3", "1e999", "5%", "2.5%"]))
_references = st.one_of(
    _names, _some(["layer.index", "module . class", "model.config.rope.theta", "linear", "base"])
)
_literals = st.one_of(_numbers, _texts, _references, _some(["true", "false"]))


def _larger(inner: Text) -> Text:
    arguments = st.one_of(inner, _phrase(_names, "=", inner))
    return st.one_of(
        _phrase("(", inner, ")"),
        _phrase("-", inner),
        _phrase("not", inner).map(lambda x: f"( {x} )"),
        _phrase(inner, _some(["+", "-", "*", "/", "and", "or"]), inner),
        _phrase(inner, _some(["==", "!=", "<", "<=", ">", ">="]), inner).map(lambda x: f"( {x} )"),
        _phrase("( if", inner, "then", inner, "else", inner, ")"),
        _phrase("[", _maybe(_list(inner)), "]"),
        _phrase("[", _list(inner), ", ]"),
        _phrase(_names, "(", _maybe(_list(arguments)), ")"),
        _phrase(_names, "(", _list(arguments), ",", ")"),
    )


_expressions = st.recursive(_literals, _larger, max_leaves=6)
_attributes = st.one_of(
    _phrase(st.one_of(_names, _some(["train", "tokens"])), "=", _expressions),
    _phrase(_names, "=", _expressions, ";", _some(["and", "else", "except", "in"]), "=", _literals),
)

_atoms = st.one_of(
    _names,
    _some(["linear", "model", "layers", "route", "default"]),
    _texts,
    _phrase(_some(["class", "regex", "parameter"]), _texts),
)
_ranges = _list(_some(["0 .. 4", "2 ..", ".. 7", "5", "8 .. 9"]))
_clauses = st.one_of(
    _phrase("except", _list(_atoms)),
    _phrase("in layers", _maybe(_phrase("of", _texts)), "[", _ranges, "]"),
    _phrase("where", _expressions),
)
_selectors = _phrase(_list(_atoms, 4), _maybe(_list(_clauses, 3, " ")))
_mixed = st.one_of(_names, _texts)
_terms = st.one_of(
    _mixed,
    _phrase(st.one_of(_numbers, _names, _phrase("(", _expressions, ")")), "*", _mixed),
)
_mixes = _phrase(_maybe(_some(["-", "+"])), _terms, _maybe(_phrase(_some(["-", "+"]), _terms)))


def _block(*statements: Text) -> Text:
    body = _list(_phrase(st.one_of(*statements), _some(["", "", ";"])), 4, " ")
    return _phrase("{", _maybe(body), "}")


_plain = _block(_attributes)
_targets = _phrase(_some(["target", "target ?"]), _selectors, _maybe(_plain))
_trains = _phrase(_some(["train", "train ?"]), _selectors)
_tokens = _phrase("tokens [", _list(_whole, 9), "]", _maybe(_phrase("in", _atoms)))
_whens = st.one_of(_phrase("when", _texts, "->", _mixes), _phrase("default ->", _mixes))
_routed = _block(_attributes, _whens)
_stacked = _block(_phrase(_some(["replicate", "drop"]), _ranges), _attributes)
_adapted = _block(_attributes, _phrase("use", _names), _targets, _trains, _tokens)
_titles = st.one_of(_names, _some(['"zephyr-7b"', "layers", "default", "model"]))
_statements = st.one_of(
    _phrase("include", _texts),
    _phrase("let", _names, "=", _expressions),
    _phrase("model", _texts, _maybe(_plain)),
    _phrase("layers", _stacked),
    _phrase("quantize", _selectors, _plain),
    _phrase("preset", _names, _plain),
    _phrase("adapter", _titles, _adapted),
    _phrase("route", _routed),
    _phrase("merge", _titles, _block(_attributes, _phrase("from", _mixes))),
    _phrase("optimizer", _plain),
    _phrase("compile", _block(_attributes, _phrase("entry", _names, _plain))),
    _phrase("check", _expressions, _maybe(_phrase(":", _texts))),
)

_COMMENTS = ["# c\n", "#\n", '#! x = { "  \n', "# a # b;\n", "#é\t\n"]
_BLANKS = [" ", "  ", "\t", "\n", "\n\n", " \n  \n\n ", "\r\n"]


@st.composite
def programs(draw: st.DrawFn) -> str:
    """Statements in any order, with comments, line breaks and `;` at odd places."""
    statements = draw(st.lists(_phrase(_statements, _some(["", "", ";"])), max_size=4))
    text = " ".join(["lora 1", *statements])
    gaps = draw(_some([_tidy, _wild]))
    return respaced(text, lambda tight: draw(gaps(tight)))


def _tidy(tight: bool) -> Text:
    return _some([" ", " ", " ", " ", " ", " ", "\n", "\n", "\n\n", " # c\n"])


def _wild(tight: bool) -> Text:
    blanks = _some(_BLANKS if tight else ["", *_BLANKS])
    parts = st.one_of(*[blanks] * 5, _some(_COMMENTS))
    return st.lists(parts, min_size=1, max_size=2).map(
        lambda parts: "".join(parts) if parts[0][:1] != "#" else " " + "".join(parts)
    )


def respaced(text: str, gap: Callable[[bool], str]) -> str:
    """Put `gap(tight)` between all tokens; `tight` says that something must stand there."""
    tokens: Sequence[str] = grammar().parse_interactive(text).exhaust_lexer()
    parts = [gap(False)]
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        tight = bool(following) and _runs_on(token[-1]) and _runs_on(following[0])
        parts += [token, gap(tight)]
    return "".join(parts)


def _runs_on(character: str) -> bool:
    return character.isalnum() or character == "_"
