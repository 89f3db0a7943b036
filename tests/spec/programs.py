"""Random `.lora` programs that are right, as text."""

from hypothesis import strategies as st

_names = st.from_regex(r"[a-z][a-z0-9_]{0,6}x", fullmatch=True)
_whole = st.integers(1, 64).map(str)
_numbers = st.one_of(
    _whole,
    st.floats(0.01, 1e6).map(lambda x: f"{x:.4f}"),
    st.sampled_from(["1e3", "2.5%", "layer.index", "layer.count", "module.in_features"]),
    st.sampled_from(["model.config.hidden_size", "model.config.rope_parameters.rope_theta"]),
)


def _arithmetic(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(inner, st.sampled_from("+-*/"), inner)
    return st.one_of(
        pairs.map(lambda p: f"{p[0]} {p[1]} {p[2]}"),
        inner.map(lambda x: f"({x})"),
        inner.map(lambda x: f"-{x}"),
        st.tuples(inner, inner).map(lambda p: f"max({p[0]}, {p[1]},)"),
        inner.map(lambda x: f"round({x})"),
        st.tuples(_conditions, inner, inner).map(lambda p: f"(if {p[0]} then {p[1]} else {p[2]})"),
    )


_compare = st.tuples(_numbers, st.sampled_from(["<", "<=", "==", "!="]), _numbers)
_conditions = st.recursive(
    _compare.map(" ".join),
    lambda inner: st.one_of(
        inner.map(lambda x: f"not ({x})"),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(" ".join),
    ),
    max_leaves=3,
)
_expressions = st.recursive(_numbers, _arithmetic, max_leaves=5)
_where = _expressions.map(lambda x: f"layer.index + {x}")  # never constant: its value is not known

_attributes = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.one_of(_whole, _where),
        "alpha": st.one_of(_numbers, _where, st.just("2 * rank")),
        "scaling": st.sampled_from(["standard", "rslora", "0.5"]),
        "dropout": st.sampled_from(["0", "0.1", "5%"]),
        "init": st.sampled_from(["default", "gaussian", "random"]),
        "seed": _whole,
        "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
        "compute": st.sampled_from(["activation", "float32"]),
        "trainable": st.sampled_from(["true", "false"]),
    },
).map(lambda values: " ".join(f"{name} = {value};" for name, value in values.items()))

_atoms = st.one_of(
    _names,
    st.just("linear"),
    st.sampled_from(['"model.layers.*.mlp.{up,down}_proj"', '"**.q_proj"', '"lm_head"']),
)
_lists = st.lists(_atoms, min_size=1, max_size=3).map(", ".join)
_ranges = st.lists(
    st.sampled_from(["0..4", "2..", "..7", "5", "8..9"]), min_size=1, max_size=3
).map(", ".join)
_clauses = st.tuples(
    st.one_of(st.just(""), _lists.map(lambda x: f" except {x}")),
    st.one_of(st.just(""), _ranges.map(lambda x: f" in layers[{x}]")),
    st.one_of(st.just(""), _conditions.map(lambda x: f" where {x}")),
).map("".join)
_targets = st.tuples(st.sampled_from(["target", "target?"]), _lists, _clauses, _attributes).map(
    lambda p: f"{p[0]} {p[1]}{p[2]} {{ {p[3]} }}"
)
_adapters = st.tuples(_attributes, st.lists(_targets, min_size=1, max_size=3)).map(
    lambda p: f"{p[0]} " + "\n  ".join(p[1])
)
_checks = st.sampled_from(
    ["check trainable <= 2.5%", 'check layer.count == 4 : "four"', "check not (sites > 3)"]
)
_once = st.lists(
    st.sampled_from(
        [
            'model "a/b" { dtype = bfloat16 }',
            "layers { replicate 0..3, 1.. }",
            'compile { unit = model; mode = "default" dynamic = true checkpoint = layers }',
            "# only a comment",
        ]
    ),
    unique=True,
)


@st.composite
def programs(draw: st.DrawFn) -> str:
    """Statements in any order; names are used after or before they are defined."""
    names = draw(st.lists(_names, unique=True, max_size=3))
    statements = [f"adapter {name} {{ {draw(_adapters)} }}" for name in names]
    statements += draw(st.lists(_checks, max_size=2)) + draw(_once)
    if draw(st.booleans()):
        statements += ["let zz = yy * 2", "let yy = 3", "preset pp { rank = zz }"]
        statements += ["adapter uses { target linear use pp }"]
    return "lora 1\n" + "\n".join(draw(st.permutations(statements)))
