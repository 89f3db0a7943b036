"""The commands themselves, at tiny shapes; no time is asserted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SMALL = ["--shape", "tiny", "--tokens", "24", "--rank", "3"]


def run(name: str, *arguments: str, module: bool = False) -> str:
    if module:
        return output("-m", f"tests.benchmarks.{name}", *SMALL, *arguments)
    script = ROOT / "tests" / "benchmarks" / f"{name}.py"
    return output(str(script), *SMALL, *arguments, cwd=Path("/"), path="")


def output(*command: str, cwd: Path = ROOT, path: str = str(ROOT)) -> str:
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def test_merge_bandwidth_times_who_merges() -> None:
    arguments = ["--shape", "tiny", "--rank", "3", "--rounds", "2"]
    text = output("-m", "tests.benchmarks.merge_bandwidth", *arguments)
    for row in ("copy", "lora_fx, 1 adapter", "lora_fx, 3 at once", "PEFT, 1 adapter", "rank 3"):
        assert row in text


@pytest.mark.parametrize("more", [[], ["--train"]])
def test_mixed_batch_times_each_way(more: list[str]) -> None:
    few = ["--layers", "1", "--adapters", "3", "--samples", "4", "--tokens", "5", "--rank", "2"]
    text = output("-m", "tests.benchmarks.mixed_batch", *few, "--rounds", "1", *more)
    rows = ["frozen base", "all adapters masked", "gathered", "one adapter"]
    for row in rows if more else [*rows, "PEFT, adapter_names"]:
        assert row in text
    assert "failed" not in text
    assert "X1" in text


def test_expert_adapters_times_who_computes_the_same() -> None:
    arguments = ["--shape", "tiny", "--rank", "3", "--rows", "40", "--rounds", "1"]
    text = output("-m", "tests.benchmarks.expert_adapters", *arguments)
    for row in ("frozen base, compiled", "lora_fx, backend = None", "PEFT as shipped", "rank 3"):
        assert row in text
    assert "failed" not in text


def test_bind_time_finds_its_stages() -> None:
    text = output("-m", "tests.benchmarks.bind_time", "--rounds", "1")
    for row in ("plan", "initialisation's arithmetic", "bind", "root", "PEFT's get_peft_model"):
        assert re.search(rf"│ {row} +│ (?!0\.000)", text), row


def test_training_step_goes_on_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    few = ["--layers", "1", "--json", str(file), "--only"]
    run("training_step", *few, "bf16 adapters, eager", "--rounds", "2")
    text = run("training_step", *few, "eager", "--rounds", "2", module=True)
    for row in (
        "T1 ",
        "T2 ",
        "lora_fx, unit = layers",
        "as shipped (fp32 adapters), eager",
        "1.000",
    ):
        assert row in text
    assert "compiled whole" not in text
    took_part = [list(entry["rounds"][0]) for entry in json.loads(file.read_text())]
    assert sorted(map(len, took_part)) == [4, 4]
    assert set(took_part[0]) != set(took_part[1])


def test_training_step_of_dora(tmp_path: Path) -> None:
    arguments = ["--layers", "1", "--rounds", "1", "--variant", "dora", "--only", ", LoRA"]
    text = run("training_step", *arguments)
    assert "DoRA / lora_fx, unit = layers, LoRA" in text
    assert "T1 " not in text


def test_blocks(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    arguments = ["--blocks", "qkv", "mlp", "--rounds", "1", "--only", "eager", "LoRAFusion"]
    text = run("blocks", *arguments, "--json", str(file))
    assert text.count("frozen base, compiled") == 2
    assert "block qkv" in text
    assert "block mlp" in text
    assert len(re.findall("LoRAFusion's linear, bf16 adapters +│ +absent", text)) == 2
    assert [entry["settings"]["block"] for entry in json.loads(file.read_text())] == ["qkv", "mlp"]


def test_layer_kernels(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    file.write_text("[0]")
    text = run("layer_kernels", "--json", str(file))
    assert "matrix products" in text
    before, entry = json.loads(file.read_text())
    assert before == 0
    kernels = entry["kernels"]
    floor, ours = (
        sum(of["launches"] for n, of in k.items() if n == "aten::mm") for k in kernels.values()
    )
    assert floor == 2 * 7, "a product forward and one backward for each linear"
    assert ours > floor


def test_switching_times_both() -> None:
    text = output("-m", "tests.benchmarks.switching", "--rounds", "1")
    for row in ("set_adapter", "disable_adapter, off and on", "merge_adapter and unmerge_adapter"):
        assert re.search(
            rf"│ {row} +│ (?!0\.0)[\d.]+ +│.+│ (?!0\.0)[\d.]+ +│.+│ [\d.]+ +│", text
        ), row
