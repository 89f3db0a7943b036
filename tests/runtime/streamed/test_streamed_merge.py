"""`lora_fx.merge`: what it writes is what the merged model would save, made tensor by tensor."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lora_fx
from lora_fx.runtime.streamed import shards, stream
from lora_fx.runtime.streamed.shards import Shard
from tests.adapters.kinds import by_peft, ours, scatter, state_of
from tests.adapters.test_kinds import KINDS
from tests.dense import relative
from tests.runtime.test_combine import EMBEDDINGS, OTHER, PARTS
from tests.runtime.test_merge import logits
from tests.tiny import llama

ROOT = Path(__file__).parents[3]
MIX = "from 0.7 * one - 1.3 * two"
SPEC = f"""lora 1
model "base"
adapter one {{ weights = "one" }}
adapter two {{ weights = "two" }}
merge production {{ {MIX}  into = base  save = "out" }}
"""


ONE = SPEC.replace('adapter two { weights = "two" }', "").replace(MIX, "from one")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(spec: str = OTHER, size: str = "20KB", dtype: Any = torch.float32) -> Any:
    """A checkpoint of several shards and two adapters; returns the model that has both."""
    base = llama(2, attention_bias=True).to(dtype).eval()
    base.save_pretrained("base", max_shard_size=size)
    trained = lora_fx.compile(base, spec, backend=None)
    for name in ("one", "two"):
        scatter(trained, name)
    trained.save_pretrained(".")
    Path("base/tokenizer.json").write_text("{}")
    Path("a.lora").write_text(SPEC)
    return trained


def merged(trained: Any) -> nn.Module:
    trained.add_weighted_adapter(["one", "two"], [0.7, -1.3], "new", "cat")
    return trained.merge_and_unload(adapter_names="new")


@pytest.mark.parametrize("spec", [OTHER, PARTS, EMBEDDINGS])
@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_as_the_merged_model(spec: str, size: str) -> None:
    trained = given(spec, size)
    assert lora_fx.merge("a.lora") == [Path("out")]
    shards = sorted(path.name for path in Path("base").glob("*.safetensors"))
    assert (len(shards) > 3) == (size == "20KB")
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(
        path.name for path in Path("base").iterdir()
    )
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        if Path("base", name).exists():
            one, other = (Path(place, name).read_text() for place in ("base", "out"))
            assert json.loads(one) == json.loads(other)
    got = AutoModelForCausalLM.from_pretrained("out").eval()
    want = merged(trained)
    assert type(got) is LlamaForCausalLM
    for name, tensor in want.state_dict().items():
        assert torch.allclose(got.state_dict()[name], tensor, 1e-5, 1e-6), name
    assert relative(logits(got), logits(want)) < 1e-5
    assert relative(logits(got), logits(llama(2, attention_bias=True).eval())) > 1e-3


@pytest.mark.parametrize("name", ["conv1d", "lora_bias", "tied", "tokens tied and scaled"])
def test_kinds_of_layers_as_peft(name: str) -> None:
    kind = KINDS[name]
    model = ours(kind)
    kind.base().save_pretrained("base")
    model.save_pretrained("one")
    Path("a.lora").write_text(
        'lora 1 model "base" adapter one { weights = "one" }'
        'merge production { from one into = base save = "out" }'
    )
    lora_fx.merge("a.lora")
    got = logits(AutoModelForCausalLM.from_pretrained("out").eval())
    assert relative(got, logits(model.eval())) < 1e-5
    if name != "tied":  # PEFT adds its delta twice
        theirs = by_peft(kind, state_of(model)).merge_and_unload()
        assert relative(got, logits(theirs)) < 1e-5
    assert relative(got, logits(kind.base())) > 1e-3


def test_dtypes() -> None:
    given(dtype=torch.bfloat16)
    text = Path("a.lora").read_text()
    lora_fx.merge("a.lora")
    one = AutoModelForCausalLM.from_pretrained("out")
    assert one.dtype is torch.bfloat16
    Path("b.lora").write_text(text.replace('"out"', '"wide" dtype = float32'))
    lora_fx.merge("b.lora")
    other = AutoModelForCausalLM.from_pretrained("wide")
    assert other.dtype is torch.float32
    index = json.loads(Path("wide/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in other.parameters())
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.float(), b)  # each W' is rounded to W's dtype


def test_adapters_are_written_too() -> None:
    trained = given()
    Path("a.lora").write_text(
        SPEC.replace("into = base", "").replace('"out"', '"new" dtype = bfloat16')
    )
    assert lora_fx.merge("a.lora", "base") == [Path("new")]
    trained.add_weighted_adapter(["one", "two"], [0.7, -1.3], "new", "cat")
    want = trained.get_adapter_state_dict("new")
    got = load_file("new/adapter_model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(tensor, want[name].bfloat16()) for name, tensor in got.items())
    loaded = lora_fx.load("new", llama(2, attention_bias=True), backend=None).eval()
    trained.set_adapter("new")
    assert relative(logits(loaded), logits(trained)) < 1e-2


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class Cut(OSError):
    pass


@pytest.mark.parametrize(
    ("error", "said"), [(Cut, lora_fx.LoraFxError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_a_run_that_was_cut_off_goes_on(
    error: Any, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given()
    lora_fx.merge("a.lora")
    want = files("out")
    Path("out").rename("before")
    written: list[str] = []
    write: Callable[..., Any] = stream._write

    def cut(shard: Shard, *rest: Any) -> Any:
        if len(written) == 2:
            raise error
        yield from write(shard, *rest)
        written.append(shard.path.name)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_write", cut)
        with pytest.raises(said):
            lora_fx.merge("a.lora")
    assert not Path("out").exists()
    first = list(written)
    written.clear()

    def count(shard: Shard, *rest: Any) -> Any:
        written.append(shard.path.name)
        return write(shard, *rest)

    monkeypatch.setattr(stream, "_write", count)
    lora_fx.merge("a.lora")
    assert files("out") == want
    assert len(written) == len(list(Path("base").glob("*.safetensors"))) - 2
    assert not set(written) & set(first)
    assert not [path for path in Path().iterdir() if path.name.startswith(".out")]


def test_what_another_run_left_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    given()
    write = stream._write

    def cut(shard: Shard, *rest: Any) -> Any:
        yield from write(shard, *rest)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_write", cut)
        with pytest.raises(lora_fx.LoraFxError, match="cannot be written"):
            lora_fx.merge("a.lora")
    Path("a.lora").write_text(SPEC.replace("0.7", "0.2"))
    lora_fx.merge("a.lora")
    after = files("out")
    lora_fx.merge("a.lora", force=True)
    assert files("out") == after


def test_nothing_is_written_of_what_is_not_finite() -> None:
    given()
    state = load_file("one/adapter_model.safetensors")
    name = next(key for key in state if "layers.1" in key and "lora_B" in key)
    base = Path(
        "base",
        json.loads(Path("base/model.safetensors.index.json").read_text())["weight_map"][
            "model.layers.1.self_attn.q_proj.weight"
        ],
    )
    tensors = load_file(base)
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 2] = torch.inf
    from safetensors.torch import save_file

    save_file(tensors, base, {"format": "pt"})
    assert name in state
    with pytest.raises(lora_fx.LoraFxError, match="NaN or infinity"):
        lora_fx.merge("a.lora")
    assert {path.name for path in Path().iterdir()} == {"base", "one", "two", "a.lora", "spec.lora"}


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Path("out").mkdir() or Path("out/x").touch(), "is there already"),
        (lambda: Path("out").touch(), "is there already"),
        (lambda: Path("a.lora").write_text(SPEC.replace('save = "out"', "")), "no merge says"),
        (
            lambda: Path("a.lora").write_text(f'{SPEC} merge m {{ from one save = "./out" }}'),
            "two merges are saved",
        ),
        (lambda: cut_off(max(Path("base").glob("*.safetensors"))), "cut off"),
        (lambda: [path.unlink() for path in Path("base").glob("*.safe*")], "no safetensors"),
        (
            lambda: Path("a.lora").write_text(
                SPEC + "layers { replicate 0..2, 1..2 share = nothing }"
            ),
            "cannot be written yet",
        ),
        (
            lambda: Path("a.lora").write_text(SPEC.replace('weights = "two"', "target q_proj")),
            "no weights yet",
        ),
    ],
)
def test_what_is_refused(change: Callable[[], object], message: str) -> None:
    given()
    change()
    there = sorted(str(path) for path in Path().rglob("*"))
    with pytest.raises(lora_fx.LoraFxError, match=message):
        lora_fx.merge("a.lora")
    assert sorted(str(path) for path in Path().rglob("*")) == there


def test_a_copy_of_a_tied_head_has_no_place() -> None:
    base = llama(2, tie_word_embeddings=True)
    base.save_pretrained("base")
    text = "lora 1 adapter default { rank = 2 target q_proj, embed_tokens train lm_head }"
    text = text.replace(", embed_tokens", "")
    trained = lora_fx.compile(base, text, backend=None)
    scatter(trained)
    trained.save_pretrained("one")
    Path("a.lora").write_text(ONE)
    with pytest.raises(lora_fx.LoraFxError, match=r"no tensor `lm_head\.weight`"):
        lora_fx.merge("a.lora")


def of_tied(lines: str, both_stored: bool) -> Any:
    """An adapter trained over a tied base, whose checkpoint stores that weight once or twice."""
    llama(2, tie_word_embeddings=True).save_pretrained("base")
    if both_stored:
        tensors = load_file("base/model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, "base/model.safetensors", {"format": "pt"})
    text = f"lora 1 adapter default {{ rank = 2 target q_proj {lines} }}"
    trained = lora_fx.compile(AutoModelForCausalLM.from_pretrained("base"), text, backend=None)
    scatter(trained)
    trained.save_pretrained("one")
    Path("a.lora").write_text(ONE)
    return trained.eval()


@pytest.mark.parametrize("both_stored", [False, True])
@pytest.mark.parametrize(
    "lines", ["tokens [1, 2, 3] in embed_tokens", "target embed_tokens { tie = true }"]
)
def test_a_tied_weight_changes_wherever_it_is_stored(lines: str, both_stored: bool) -> None:
    want = logits(of_tied(lines, both_stored))
    (out,) = lora_fx.merge("a.lora")
    assert relative(logits(AutoModelForCausalLM.from_pretrained(out).eval()), want) < 1e-5
    assert relative(logits(AutoModelForCausalLM.from_pretrained("base").eval()), want) > 1e-2


def test_one_end_of_a_weight_that_is_stored_once() -> None:
    of_tied('train "model.embed_tokens"', both_stored=False)
    with pytest.raises(lora_fx.LoraFxError, match=r"one tensor for `model\.embed_tokens\.weight`"):
        lora_fx.merge("a.lora")


def test_one_end_of_a_weight_that_is_stored_twice() -> None:
    want = logits(of_tied('train "model.embed_tokens"', both_stored=True))
    (out,) = lora_fx.merge("a.lora")
    assert relative(logits(AutoModelForCausalLM.from_pretrained(out).eval()), want) < 1e-5


PEAK = """
import resource, sys
import torch
torch.set_num_threads(1)
import lora_fx, lora_fx.compiler
from transformers import LlamaForCausalLM
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lora_fx.merge("a.lora")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_the_peak_is_far_below_the_model() -> None:
    base = llama(6, hidden_size=768, intermediate_size=2304, num_attention_heads=12)
    base.save_pretrained("base", max_shard_size="60MB")
    trained = lora_fx.compile(
        base, "lora 1 adapter default { rank = 4 init = random target linear }", backend=None
    )
    trained.save_pretrained("one")
    Path("a.lora").write_text(ONE)
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=None
    )
    whole = sum(p.nbytes for p in base.parameters())
    assert whole > 150e6
    assert int(done.stdout) < 100e6
    got = AutoModelForCausalLM.from_pretrained("out").eval()
    assert relative(logits(got), logits(trained.eval())) < 1e-5


@dataclass(frozen=True)
class OneMore:
    """Adds 1 to a tensor, or to each of its rows how many stand before it, and 1."""

    has_rows: bool

    def __call__(self, values: Tensor) -> Tensor:
        return values + 1

    def of_rows(self, rows: Tensor, start: int) -> Tensor:
        return rows.add_(torch.arange(start, start + len(rows))[:, None] + 1)


def test_a_tensor_of_no_elements_and_of_whole_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {
        "none": torch.empty(0, 3),
        "ids": torch.arange(5),
        "w": torch.randn(9, 5, dtype=torch.float16),
        "v": torch.randn(9, 5),  # written from where it is read to
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(shards, "_PIECE", 20)  # of two rows of w
    append = shards.append

    def late(file: Any, tensor: Tensor) -> None:
        time.sleep(0.02)
        append(file, tensor)

    monkeypatch.setattr(shards, "append", late)
    shard = Shard.open(tmp_path / "model.safetensors")
    changes: dict[str, Any] = {
        "none": OneMore(has_rows=False),
        "w": OneMore(has_rows=True),
        "v": OneMore(has_rows=True),
    }
    list(stream._write(shard, tmp_path / "out", changes, torch.float32))
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(got["ids"], tensors["ids"])
    assert torch.equal(got["w"], (tensors["w"] + torch.arange(1, 10)[:, None]).float())
    assert torch.equal(got["v"], tensors["v"] + torch.arange(1, 10)[:, None])
    assert got["none"].shape == (0, 3)


def test_a_file_that_is_cut_off_meanwhile(tmp_path: Path) -> None:
    save_file({"w": torch.randn(9, 5)}, tmp_path / "model.safetensors")
    shard = Shard.open(tmp_path / "model.safetensors")
    os.truncate(shard.path, shard.path.stat().st_size - 8)
    with pytest.raises(OSError, match="has been cut off"):
        shard.read("w")
    with pytest.raises(OSError, match="has been cut off"):
        list(shard.rows("w"))
