from pathlib import Path

import pytest

from tests.spec.fuzz import failure, fuzz, smallest


@pytest.mark.parametrize(
    "number", [150, pytest.param(5_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_nothing_but_errors_with_a_place(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fuzz(number, seed=number) == []


def test_a_failure_would_be_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str) -> str:
        return str(int("x")) if "target" in text else text

    monkeypatch.setattr("tests.spec.fuzz.formatted", broken)
    what = failure("lora 1\nadapter x { target linear }\n")
    assert what == "ValueError in broken, test_fuzz.py"
    assert smallest("lora 1\nadapter x { target linear }\n", what) == "target\n"
