import time
from pathlib import Path

import pytest
from hypothesis import given, settings

from lora_fx.diagnostics import LoraFxError
from lora_fx.spec.grammar import grammar
from tests.golden import assert_golden
from tests.spec.formatting import check, formatted
from tests.spec.grammatical import programs

HERE = Path(__file__).parent
EXAMPLES = HERE.parent.parent / "examples"


@settings(max_examples=250, deadline=None)
@given(programs())
def test_the_tree_and_the_comments_stay_and_once_is_enough(text: str) -> None:
    check(text)


def test_the_programs_cover_the_grammar() -> None:
    rules, terminals = set[str](), set[str]()

    @settings(max_examples=700, deadline=None, database=None, derandomize=True)
    @given(programs())
    def collect(text: str) -> None:
        rules.update(str(node.data) for node in grammar().parse(text).iter_subtrees())
        tokens = grammar().parse_interactive(text).exhaust_lexer()
        terminals.update(token.type for token in tokens)

    collect()
    named = {str(rule.alias or rule.origin.name) for rule in grammar().rules}
    assert {name for name in named if name[0] != "_"} <= rules
    ignored = set(grammar().lexer_conf.ignore)
    assert {terminal.name for terminal in grammar().terminals} <= terminals | ignored


@pytest.mark.parametrize("path", sorted(HERE.glob("files/*.lora")), ids=lambda path: path.stem)
def test_files(path: Path) -> None:
    assert_golden(HERE / "formatted" / path.name, check(path.read_text()))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.lora")), ids=lambda path: path.stem)
def test_examples_are_formatted(path: Path) -> None:
    assert formatted(path.read_text()) == path.read_text()


def test_the_style_is_that_of_the_reference() -> None:
    reference = (HERE.parent.parent / "grammar" / "README.md").read_text()
    section = reference.partition("## Formatting\n")[2].partition("\n## ")[0]
    block = section.partition("```lora\n")[2].partition("```")[0]
    assert check(block) == block


def body(inside: str) -> str:
    """The lines of an adapter's block, formatted."""
    first, *lines, last = check(f"lora 1\nadapter x {{\n{inside}\n}}").splitlines()[1:]
    assert (first, last) == ("adapter x {", "}")
    return "\n".join(line[2:] for line in lines)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("1+2*3-4/x", "1 + 2 * 3 - 4 / x"),
        ("-  1 - -x", "-1 - -x"),
        ("( a==b )and not( c<d )or e", "(a == b) and not (c < d) or e"),
        ("max( a ,b, )", "max(a, b)"),
        ("f ( )", "f()"),
        ("nf4(double_quant=true,n=[ 1,2 ])", "nf4(double_quant = true, n = [1, 2])"),
        ("if a<b then c else-d", "if a < b then c else -d"),
        ("layer . index*5%", "layer.index * 5%"),
        ("[ ]", "[]"),
        ('"#  ;{,"', '"#  ;{,"'),
        (r'"\"  \\"', r'"\"  \\"'),
    ],
)
def test_expressions(value: str, shown: str) -> None:
    assert body(f"rank={value}") == f"rank = {shown}"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("target  ?a,b", "target? a, b"),
        ('target"*.a"except b', 'target "*.a" except b'),
        ("target a in layers [ ..4,8 , 9 .. 12,20.. ]", "target a in layers[..4, 8, 9..12, 20..]"),
        ('target a in layers of"m.l"[0..1]where(a)', 'target a in layers of "m.l"[0..1] where (a)'),
        ('train? class"X",regex  "y"', 'train? class "X", regex "y"'),
        ("tokens[1,2]in embed", "tokens [1, 2] in embed"),
        ("use  p;", "use p"),
        ("target a{rank=1}", "target a { rank = 1 }"),
        ("target a{ }", "target a { }"),
        ("target a{\n}", "target a { }"),
        ("target a { rank=1;alpha=2 }", "target a { rank = 1  alpha = 2 }"),
        ("target a { rank=1\n}", "target a {\n  rank = 1\n}"),
        ("use\np\nuse q use r", "use p\nuse q\nuse r"),
    ],
)
def test_statements(written: str, shown: str) -> None:
    assert body(written) == shown


def test_a_semicolon_stays_where_a_name_would_be_a_keyword_without_it() -> None:
    assert body("rank=a;#c\nexcept=1;alpha=2") == "rank   = a;  #c\nexcept = 1\nalpha  = 2"
    written = "lora 1\ncompile{entry train{batch=1};target=1}"
    assert check(written) == "lora 1\ncompile { entry train { batch = 1 };  target = 1 }\n"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ('merge m{from-0.5*a+b-(x+1)*"c"}', 'merge m { from -0.5 * a + b - (x + 1) * "c" }'),
        ('route{when"x"->a default->base}', 'route { when "x" -> a  default -> base }'),
        ("layers{drop 3..;replicate ..4}", "layers { drop 3..  replicate ..4 }"),
        ("compile{entry train{batch=1}}", "compile { entry train { batch = 1 } }"),
        ('check a<b:"no"', 'check a < b : "no"'),
        ("let a=1;let bb=2", "let a = 1\nlet bb = 2"),
    ],
)
def test_statements_of_a_file(written: str, shown: str) -> None:
    assert check(f"lora 1;{written}") == f"lora 1\n{shown}\n"


def test_equals_signs_stand_in_one_column_in_adjacent_lines() -> None:
    written = "rank=1 alpha=2;# c\nseed=3\n\nbias=all\n# d\ndropout=0 use p\ntie=true"
    assert body(written) == (
        "rank  = 1\nalpha = 2  # c\nseed  = 3\n\nbias = all\n# d\ndropout = 0\nuse p\ntie = true"
    )


def test_arrows_stand_in_one_column() -> None:
    route = 'route {\nslots = 8\nwhen "a" -> x\ndefault -> base\n}'
    lines = ["  slots = 8", '  when "a" -> x', "  default  -> base"]
    assert check(f"lora 1\n{route}").splitlines()[1:] == ["route {", *lines, "}"]
    long = f'route {{\nwhen "{"a" * 40}" -> x\ndefault -> base\n}}'
    assert "  default -> base" in check(f"lora 1\n{long}")


def test_comments_stand_in_one_column_behind_adjacent_lines() -> None:
    written = "rank=1# a\nalpha = 16    #b\nuse p\nuse q # c\n\nuse long_name # d"
    assert body(written) == (
        "rank  = 1   # a\nalpha = 16  #b\nuse p\nuse q  # c\n\nuse long_name  # d"
    )


def test_comments_inside_a_statement_break_it() -> None:
    assert body("target q # a\n , v # b\n {rank=1}") == (
        "target q,  # a\n    v {    # b\n  rank = 1\n}"
    )
    assert body("init = eva(\n  rho = 2, # a\n# b\n  whiten = true\n)") == (
        "init = eva(rho = 2,  # a\n    # b\n    whiten = true)"
    )
    assert body("target q # a\n# b\n{ # c\n# d\n}") == ("target q {  # a\n  # b\n  # c\n  # d\n}")


def test_blank_lines() -> None:
    written = "\n\n# a\n\n\n# b\nrank = 1\n;\nalpha = 2\n\n;\n\nuse p\n\n\n# c\n\n"
    assert body(written) == "# a\n\n# b\nrank  = 1\nalpha = 2\n\nuse p\n\n# c"


def test_blocks_of_several_lines_stand_apart() -> None:
    written = (
        '\n# a\n\nlora 1\n# b\nmodel "m" {\ndtype=auto\n}# c\n# d\npreset p { }\npreset q { }'
        "\n# e\nadapter x {\nuse p\n}\n# f\n\ncheck a # g"
    )
    assert check(written) == (
        '# a\n\nlora 1\n# b\nmodel "m" {\n  dtype = auto\n}  # c\n\n# d\npreset p { }\npreset q { }'
        "\n\n# e\nadapter x {\n  use p\n}\n# f\n\ncheck a  # g\n"
    )


def test_long_lines_are_broken_behind_commas_and_before_clauses() -> None:
    names = ", ".join(f"name_of_module_{i}" for i in range(7))
    assert body(f"target {names} except a in layers[1, 2] {{ rank = 1 }}") == (
        "target name_of_module_0, name_of_module_1, name_of_module_2, name_of_module_3, "
        "name_of_module_4,\n"
        "    name_of_module_5, name_of_module_6 except a in layers[1, 2] {\n"
        "  rank = 1\n}"
    )
    numbers = ", ".join(str(i) for i in range(100, 130))
    assert body(f"tokens [{numbers}] in embed") == (
        f"tokens [{', '.join(str(i) for i in range(100, 118))},\n"
        f"    {', '.join(str(i) for i in range(118, 130))}] in embed"
    )
    assert body(f"rank = if {'a' * 40} < {'b' * 40} then max({'c' * 20}, d) else 1") == (
        f"rank = if {'a' * 40} < {'b' * 40}\n    then max({'c' * 20}, d) else 1"
    )


def test_a_block_on_one_line_is_broken_where_it_is_too_long() -> None:
    short = f"rank = {'1' * 40}  alpha = {'2' * 28}"
    assert body(f"target a {{ {short} }}") == f"target a {{ {short} }}"
    longer = body(f"target a {{ {short}3 }}")
    assert longer == f"target a {{\n  rank  = {'1' * 40}\n  alpha = {'2' * 28}3\n}}"


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(LoraFxError) as raised:
        formatted("lora 1\nadapter x { rank 8 alpha 3 }")
    assert [fault.code for fault in raised.value.diagnostics] == ["syntax-error"] * 2
    for text in ("", "lora 1\n" + "#" * 300_000):
        with pytest.raises(LoraFxError):
            formatted(text)


@pytest.mark.parametrize(
    "text",
    [
        "let a = " + "(" * 20_000 + "1" + ")" * 20_000,
        "let a = [" + "1," * 30_000 + "]",
        "check " + "1 + " * 20_000 + "1",
        f"adapter x {{ # a\nuse {'u' * 120_000} # b\n" + "use a # b\n" * 10_000 + "}",
        f'route {{ when "{"u" * 120_000}" -> a\n' + "default -> a\n" * 9_000 + "}",
        "layers {" + "}\nlayers {" * 10_000 + "}",
        "# c\n" * 60_000,
    ],
    ids=lambda text: text[:10],
)
def test_time_and_size_are_bounded(text: str) -> None:
    start = time.monotonic()
    once = formatted(f"lora 1\n{text}")
    assert time.monotonic() - start < 60
    assert len(once) < 600_000
