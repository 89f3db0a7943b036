"""The arithmetic of benchmarks, on times that are given."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.record import Record

SETTINGS = {"layers": 2, "rank": 4}
MACHINE = {"device": "a GPU", "code": "0123abcd"}
ROUNDS = [
    {"floor": 10.0, "ours": 11.0, "peft": 15.0},
    {"floor": 20.0, "ours": 24.0, "peft": 26.0},
    {"floor": 40.0, "ours": 50.0},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "numbers" / "file.json"


def filled(path: Path | None, rounds: list[dict[str, float]] = ROUNDS, **changed: object) -> Record:
    record = Record(path, SETTINGS | changed, MACHINE)
    run = record.new()
    run.rounds += rounds
    run.facts |= {name: {"held": float(i), "step": 2.0} for i, name in enumerate(rounds[0])}
    record.save()
    return record


def test_a_ratio_is_the_median_over_rounds_that_both_took_part_in() -> None:
    record = filled(None)
    assert record.ratio("ours", "floor") == pytest.approx(1.2)
    assert record.ratios("peft", "ours") == pytest.approx([15 / 11, 26 / 24])
    assert record.ratio("peft", "absent") is None
    # not the ratio of the medians, which mixes rounds
    assert record.ratio("peft", "floor") == pytest.approx((1.5 + 1.3) / 2)
    assert sum(record.times("peft")) / 2 / 20 != pytest.approx(1.4)


def test_runs_are_merged_but_never_compared_across(path: Path) -> None:
    filled(path)
    record = filled(path, [{"floor": 1000.0, "whole": 1500.0}])
    assert record.names() == ["floor", "ours", "peft", "whole"]
    assert record.times("floor") == [10, 20, 40, 1000]
    assert record.ratios("whole", "floor") == [1.5]
    assert record.ratio("whole", "ours") is None
    assert record.ratio("ours", "floor") == pytest.approx(1.2)


def test_only_rounds_that_are_missing_are_lacking(path: Path) -> None:
    filled(path)
    record = Record(path, SETTINGS, MACHINE)
    assert record.lacking(["floor", "ours", "peft"], 3) == {"peft": 1}
    assert record.lacking(["floor", "new"], 4) == {"floor": 1, "new": 4}
    assert record.lacking(["ours"], 2) == {}


@pytest.mark.parametrize("other", [{"rank": 8}, {"layers": 3}, {"dropout": 0.1}])
def test_other_settings_are_kept_in_the_file_and_not_counted(path: Path, other: dict) -> None:
    filled(path)
    record = filled(path, [{"floor": 7.0, "ours": 9.0}], **other)
    assert record.times("floor") == [7]
    assert record.ratio("peft", "floor") is None
    assert len(json.loads(path.read_text())) == 2
    assert Record(path, SETTINGS, MACHINE).times("floor") == [10, 20, 40]


def test_numbers_of_other_code_or_another_device_are_not_counted(path: Path) -> None:
    filled(path)
    for other in ({"code": "f00"}, {"device": "another"}):
        assert Record(path, SETTINGS, MACHINE | other).times("floor") == []


def test_what_is_written_is_read_again(path: Path) -> None:
    written = filled(path)
    written.runs[0].failed["peft"] = "tried once more, in vain"
    written.runs[0].failed["whole"] = "OutOfMemoryError: too much"
    written.save()
    read = Record(path, SETTINGS, MACHINE)
    assert read.runs == written.runs
    assert read.failed() == {"whole": "OutOfMemoryError: too much"}
    assert read.fact("ours", "held") == 1
    assert read.fact("ours", "first_s") is None
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


def test_saving_while_measuring_adds_to_the_same_run(path: Path) -> None:
    record = filled(path)
    record.runs[0].rounds.append({"floor": 1.0})
    record.save()
    record.save()
    assert len(json.loads(path.read_text())) == 1
    assert Record(path, SETTINGS, MACHINE).times("floor") == [10, 20, 40, 1]
