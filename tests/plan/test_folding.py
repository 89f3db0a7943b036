from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_fx.plan.folding import fold, ranges, unfold


def folded(*names: str) -> list[str]:
    return [str(one) for one in fold(names)]


def test_runs_of_layers() -> None:
    names = [f"model.layers.{i}.mlp.up" for i in (0, 1, 2, 5)]
    assert folded(*names, "head") == ["model.layers.{0..2,5}.mlp.up", "head"]


def test_what_is_not_alike_stays_apart() -> None:
    assert folded("a.0.b", "a.1.c", "a.1.b", "b.0.b") == ["a.{0..1}.b", "a.1.c", "b.0.b"]
    assert folded("a.0", "a", "a.0.b") == ["a.0", "a", "a.0.b"]


def test_a_fold_is_all_combinations() -> None:
    names = [f"h.{i}.experts.{j}.up" for i, j in product((0, 1, 2), (0, 1, 2, 3))]
    assert folded(*names) == ["h.{0..2}.experts.{0..3}.up"]
    assert folded(*names[:-1]) == ["h.{0..1}.experts.{0..3}.up", "h.2.experts.{0..2}.up"]


def test_parts() -> None:
    (one,) = fold(["a.h.3.experts.0.up", "a.h.3.experts.1.up"])
    assert (one.stack, one.layers, one.rest) == ("a.h", (3,), "experts.{0..1}.up")
    (one,) = fold(["score"])
    assert (one.stack, one.layers, one.rest) == ("", (), "score")
    (one,) = fold(
        [
            "0",
        ]
    )
    assert str(one) == "0"


def test_numbers_with_zeros_before_them_are_texts() -> None:
    assert folded("a.01", "a.1", "a.2") == ["a.01", "a.{1..2}"]


def test_ranges() -> None:
    assert ranges([0, 1, 2, 4, 6, 7], ", ") == "0..2, 4, 6..7"


NAMES = st.lists(
    st.lists(st.sampled_from(["a", "b", "0", "1", "2", "7"]), min_size=1, max_size=4).map(".".join),
    unique=True,
)


@given(NAMES)
def test_every_name_is_in_one_fold_once(names: list[str]) -> None:
    folds = fold(names)
    assert sorted(name for one in folds for name in one.names) == sorted(names)
    for one in folds:
        assert sorted(unfold(str(one))) == sorted(one.names)


@pytest.mark.parametrize("text", ["a.{x}", "a.{0..1000000000}", "a.{0..b}", "a.{}"])
def test_what_is_no_folded_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"invalid literal|range"):
        unfold(text)
