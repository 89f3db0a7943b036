"""How benchmarks measure, with steps that count instead of computing; no time is asserted."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.benchmarks import interleaved
from tests.benchmarks.interleaved import Build, measure
from tests.benchmarks.record import Record

ALWAYS = ("floor",)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "LEAST_MS", 0.001)


def counting(calls: list[str], name: str) -> Build:
    def build():
        calls.append(f"build {name}")
        return lambda: calls.append(name)

    return build


def record_in(path: Path) -> Record:
    return Record(path, {"layers": 2}, {"device": "none"})


def test_each_round_times_each_candidate_once(tmp_path: Path) -> None:
    calls: list[str] = []
    record = record_in(tmp_path / "f.json")
    builds = {name: counting(calls, name) for name in ("floor", "ours", "peft")}
    measure(builds, 5, record, ALWAYS)
    assert [set(row) for row in record.runs[0].rounds] == [set(builds)] * 5
    assert all(time > 0 for row in record.runs[0].rounds for time in row.values())
    assert calls.count("build ours") == 1
    assert len({tuple(row) for row in record.runs[0].rounds}) > 1, "always in one order"


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    calls: list[str] = []
    path = tmp_path / "f.json"
    builds = {name: counting(calls, name) for name in ("floor", "ours", "peft")}
    stopped = builds | {"peft": lambda: stop_after(9)}
    with pytest.raises(KeyboardInterrupt):
        measure(stopped, 6, record_in(path), ALWAYS)
    done = len(record_in(path).times("ours"))
    assert 0 < done < 6
    calls.clear()
    measure(builds, 6, record_in(path), ALWAYS)
    assert len(record_in(path).times("ours")) == 6
    calls.clear()
    measure(builds, 6, record_in(path), ALWAYS)
    assert calls == []
    measure(builds | {"new": counting(calls, "new")}, 6, record_in(path), ALWAYS)
    assert [call for call in calls if "build" in call] == ["build floor", "build new"]
    assert record_in(path).ratio("new", "floor") is not None


def stop_after(steps: int):
    left = iter(range(steps * interleaved.LEAST_REPEATS))

    def step() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return step


def test_one_that_cannot_run_leaves_the_others(tmp_path: Path) -> None:
    def absent():
        raise ModuleNotFoundError("No module named 'rival'")

    record = record_in(tmp_path / "f.json")
    measure({"floor": counting([], "floor"), "rival": absent}, 2, record, ALWAYS)
    assert record.names() == ["floor"]
    assert record.failed() == {"rival": "ModuleNotFoundError: No module named 'rival'"}
    with pytest.raises(ModuleNotFoundError):
        measure({"floor": absent}, 9, record, ALWAYS)


def test_graphs_are_counted_also_while_timed(tmp_path: Path) -> None:
    sizes = iter(range(2, 1000))

    def compiled(changing: bool) -> Build:
        def build():
            double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
            inputs: list[Tensor] = [torch.ones(n, 3) for n in range(2, 30)]
            return lambda: double(inputs[next(sizes) % 28 if changing else 0])

        return build

    record = record_in(tmp_path / "f.json")
    measure({"floor": compiled(False), "changing": compiled(True)}, 2, record, ALWAYS)
    assert not torch._dynamo.config.fail_on_recompile_limit_hit, "left set"
    assert record.fact("floor", "graphs") == 1
    assert record.fact("floor", "recompiled") == 0
    assert record.fact("changing", "graphs") == 1 + interleaved.WARM_UP
    assert (record.fact("changing", "recompiled") or 0) > 0
