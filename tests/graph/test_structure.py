from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_fx.graph.convolution import Window
from lora_fx.graph.structure import Branch, Structure

NUMBERS = st.integers(1, 64)


def in_a_batch(branch: Branch, column: int | None, rest: bool, invoked: int | None) -> Branch:
    return replace(branch, column=column, rest=rest and column is not None, invoked=invoked)


own = st.builds(
    Branch,
    st.integers(1, 512),
    st.floats(0, 1),
    st.sampled_from(["activation", "float32", "bfloat16"]),
    st.booleans(),
    st.booleans(),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    NUMBERS,
    st.floats(1e-6, 1e6),
    st.booleans(),
    NUMBERS,
    st.floats(1e-6, 1e6),
)
COLUMNS = st.none() | st.integers(0, 70)
branches = st.builds(in_a_batch, own, COLUMNS, st.booleans(), COLUMNS)
many = st.builds(Branch, NUMBERS, column=st.integers(0, 70), many=NUMBERS)
SIZES = st.integers(0, 9)
windows = st.integers(1, 3).flatmap(
    lambda n: st.builds(
        Window,
        st.tuples(*[SIZES] * n),
        st.tuples(*[st.tuples(SIZES, SIZES)] * n),
        st.tuples(*[SIZES] * n),
        st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    )
)
structures = st.builds(
    Structure,
    st.sampled_from(["linear", "embedding", "conv"]),
    st.lists(branches, min_size=1, max_size=3).map(tuple)
    | st.builds(lambda some, last: (*some, last), st.lists(branches, max_size=2), many),
    st.none() | st.integers(0, 9),
    st.sampled_from([1.0, 2.5, 1e-07, 5.656854152679443]),
    st.none() | windows,
    st.none(),
    st.integers(0, 5),
    st.none() | st.tuples(NUMBERS, st.floats(1e-6, 1e6)),
)


@given(structures)
def test_a_key_reads_back(structure: Structure) -> None:
    assert Structure.parse(str(structure)) == structure


@given(structures, structures)
def test_keys_differ_where_structures_do(a: Structure, b: Structure) -> None:
    assert (str(a) == str(b)) == (a == b)


@pytest.mark.parametrize(
    "text", ["", "linear", "linear[]", "linear[r4]", "linear[r4:p0:f;x]", "conv(2:1)[r4:p0:f]"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="structure"):
        Structure.parse(text)
