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


def _values(optional: dict[str, st.SearchStrategy[str]]) -> st.SearchStrategy[str]:
    return st.fixed_dictionaries({}, optional=optional).map(
        lambda values: " ".join(f"{name} = {value};" for name, value in values.items())
    )


_attributes = _values(
    {
        "rank": st.one_of(_whole, _where),
        "alpha": st.one_of(_numbers, _where, st.just("2 * rank")),
        "scaling": st.sampled_from(["standard", "rslora", "0.5"]),
        "dropout": st.sampled_from(["0", "0.1", "5%"]),
        "init": st.sampled_from(
            [
                *("default", "gaussian", "pissa", "pissa(iterations = 4)", "olora", "mica"),
                *("loftq(bits = 8)", "eva(rho = 1.5, tau = 0.9)", "corda(kpm)", "orthogonal"),
                "lora_ga(direction = random, scale = unit, stable_gamma = 2)",
            ]
        ),
        "variant": st.sampled_from(
            [
                *("lora", "dora", "alora(tokens = [1, 2,])", "velora(init_type = random)"),
                *("kasa(beta = 0)", 'bdlora(a = ["q"], blocks = 2)', "monteclora(num_samples = 3)"),
            ]
        ),
        "lora_bias": st.sampled_from(["true", "false"]),
        "tie": st.sampled_from(["true", "false"]),
        "offload": st.sampled_from(["true", "false"]),
        "seed": _whole,
        "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
        "compute": st.sampled_from(["activation", "float32"]),
        "trainable": st.sampled_from(["true", "false"]),
    }
)
_of_the_adapter = _values(
    {
        "weights": st.sampled_from(['"folder"', '"someone/adapter"']),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
    }
)

_atoms = st.one_of(
    _names,
    st.just("linear"),
    st.sampled_from(['"model.layers.*.mlp.{up,down}_proj"', '"**.q_proj"', '"lm_head"']),
    st.sampled_from(['class "Linear"', r'regex ".*\\.[qv]_proj"', 'parameter "**.down_proj"']),
)
_lists = st.lists(_atoms, min_size=1, max_size=3).map(", ".join)
_ranges = st.lists(
    st.sampled_from(["0..4", "2..", "..7", "5", "8..9"]), min_size=1, max_size=3
).map(", ".join)
_clauses = st.tuples(
    st.one_of(st.just(""), _lists.map(lambda x: f" except {x}")),
    st.one_of(
        st.just(""),
        _ranges.map(lambda x: f" in layers[{x}]"),
        _ranges.map(lambda x: f' in layers of "model.layers"[{x}]'),
    ),
    st.one_of(st.just(""), _conditions.map(lambda x: f" where {x}")),
).map("".join)
_targets = st.tuples(st.sampled_from(["target", "target?"]), _lists, _clauses, _attributes).map(
    lambda p: f"{p[0]} {p[1]}{p[2]} {{ {p[3]} }}"
)
_trained = st.sampled_from(
    ["train lm_head", 'train? "model.norm", head except x', "tokens [0, 7]", "tokens [1] in embed"]
)
_adapters = st.tuples(
    _attributes, _of_the_adapter, st.lists(_targets, min_size=1, max_size=3), st.lists(_trained)
).map(lambda p: f"{p[0]} {p[1]} " + "\n  ".join(p[2] + p[3]))
_checks = st.sampled_from(
    ["check trainable <= 2.5%", 'check layer.count == 4 : "four"', "check not (sites > 3)"]
)
_once = st.lists(
    st.sampled_from(
        [
            'model "a/b" { dtype = bfloat16 }',
            'layers { replicate 0..3, 1.. drop 2 share = nothing; of = "model.layers" }',
            'compile { unit = model; mode = "default" dynamic = true checkpoint = layers }',
            "compile { checkpoint = budget(0.5) entry train { batch = 2 sequence = 8 } }",
            "quantize linear except head { method = nf4(double_quant = true) storage = bfloat16 }",
            "quantize x { method = int8(threshold = 6) }",
            "optimizer { name = adamw8bit lr = 2e-4; betas = [0.9, 0.95] loraplus_ratio = 16 }",
            "optimizer { name = sgd lr = 0.1 momentum = 90% }",
            "# only a comment",
        ]
    ),
    unique_by=lambda statement: statement.split()[0],
)
_mixes = st.sampled_from(
    ["{0}", "- {0} + 0.5 * {1}", "0.7 * {0} - (1 - yy / 9) * {1}", '50% * "{0}"', "yy * {1}"]
)


def _mixing(first: str, other: str) -> st.SearchStrategy[str]:
    methods = st.sampled_from(
        ["cat", "ties(density = 0.5, sign = total)", "dare_linear_svd(density = 20%)", "svd"]
    )
    merge = st.tuples(_mixes, methods).map(
        lambda p: f'merge both {{ from {p[0]} method = {p[1]}; rank = svd(4) save = "out" }}'
    )
    folded = _mixes.map(lambda mix: f"merge gone {{ into = base(dequantize = true) from {mix} }}")
    routes = st.tuples(_mixes, st.one_of(_mixes, st.just("base"))).map(
        lambda p: f'route {{ slots = 8 train = true when "m i x" -> {p[0]}; default -> {p[1]} }}'
    )
    texts = st.tuples(merge, folded, routes).map("\n".join)
    return texts.map(lambda text: text.replace("{0}", first).replace("{1}", other))


@st.composite
def programs(draw: st.DrawFn) -> str:
    """Statements in any order; names are used after or before they are defined."""
    names = draw(st.lists(_names, unique=True, max_size=3))
    statements = [f"adapter {name} {{ {draw(_adapters)} }}" for name in names]
    statements += draw(st.lists(_checks, max_size=2)) + draw(_once)
    mixed = len(names) > 1 and draw(st.booleans())
    if mixed:
        statements += draw(_mixing(*names[:2])).splitlines()
    if mixed or draw(st.booleans()):
        statements += ["let zz = yy * 2", "let yy = 3", "preset pp { rank = zz }"]
        statements += ["adapter uses { target linear use pp }"]
    return "lora 1\n" + "\n".join(draw(st.permutations(statements)))
