"""Starting from an artifact: what is run of it, and what is never run."""

import copy
import json
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.adapters.peft.write import CONFIG
from lora_fx.runtime.artifact import key, layout, trust
from lora_fx.runtime.artifact.manifest import read_manifest
from lora_fx.runtime.artifact.precompiled import Precompiled
from tests.runtime.artifact.made import BATCH, LENGTH, build, text
from tests.runtime.test_transactions import saved
from tests.tiny import assert_differ, graphs, llama, step, tokens


@pytest.fixture
def folder(artifact: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def evaluated(model: Any, *sizes: int) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(tokens(*(sizes or (BATCH, LENGTH)))).logits


def unit_of(model: Any) -> Any:
    return model.model.layers[0].lora_fx_unit


def marked(spec: str | None = None) -> Any:
    return lora_fx.compile(llama(2), spec or text(), backend=None)


def test_its_code_is_called(artifact: Path) -> None:
    model = lora_fx.load(artifact, llama(2))
    before = graphs()
    assert torch.allclose(evaluated(model), evaluated(marked()), atol=1e-5)
    assert graphs() == before
    assert isinstance(unit_of(model), Precompiled)
    with marked().disable_adapter() as _, torch.no_grad():
        assert_differ([evaluated(model)], [llama(2).eval()(tokens(BATCH, LENGTH)).logits])


def test_values_are_those_in_force(artifact: Path) -> None:
    """Weights, adapters and scalings are inputs of compiled code, not part of it."""
    model, other = lora_fx.load(artifact, llama(2)), marked()
    for one in (model, other):
        with torch.no_grad():
            one.model.layers[1].mlp.up_proj.lora_B["default"].weight.add_(0.5)
            one.model.layers[0].mlp.down_proj.weight.data = (
                one.model.layers[0].mlp.down_proj.weight.data * 2
            )
    assert torch.allclose(evaluated(model), evaluated(other), atol=1e-5)
    assert_differ([evaluated(model)], [evaluated(marked())])


def test_the_adapters_are_those_of_the_artifact(artifact: Path) -> None:
    model = lora_fx.load(artifact, llama(2))
    want = dict(marked().named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, want[name])
        assert parameter.requires_grad == want[name].requires_grad
    assert model.active_adapters() == ["default"]
    plan = json.dumps(model.lora_fx_plan.to_json(), sort_keys=True, indent=2)
    assert placeless(plan) == placeless((artifact / layout.PLAN).read_text())


def placeless(plan: str) -> str:
    """A plan without the name of the file that it is of, in `file:line`."""
    return re.sub(r'"[^"]*:(\d+)"', r"\1", plan.strip())


@pytest.mark.parametrize("backend", ["eager", None])
def test_without_inductor_no_code_is_used(artifact: Path, backend: Any) -> None:
    model = lora_fx.load(artifact, llama(2), backend=backend)
    assert not isinstance(getattr(model.model.layers[0], "lora_fx_unit", None), Precompiled)
    assert torch.allclose(evaluated(model), evaluated(marked()), atol=1e-5)


def test_another_call_compiles_and_says_so(artifact: Path) -> None:
    model = lora_fx.load(artifact, llama(2))
    with pytest.warns(UserWarning, match="no compiled code for this call"):
        found = evaluated(model, BATCH, LENGTH + 1)
    assert torch.allclose(found, evaluated(marked(), BATCH, LENGTH + 1), atol=1e-5)
    evaluated(model, BATCH, LENGTH + 2)  # said once


def test_what_changes_the_computation_is_seen(artifact: Path) -> None:
    """Adapters off, and another one that has other ranks, are not what was compiled."""
    model, other = lora_fx.load(artifact, llama(2)), marked()
    with pytest.warns(UserWarning, match="compiled now"), model.disable_adapter():
        off = evaluated(model)
    with other.disable_adapter():
        assert torch.allclose(off, evaluated(other), atol=1e-5)
    assert torch.allclose(evaluated(model), evaluated(other), atol=1e-5)


def test_copies_call_the_same_code_and_pickles_compile_anew(artifact: Path) -> None:
    model = lora_fx.load(artifact, llama(2))
    evaluated(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.lora_B["default"].weight.add_(1.0)
    before = graphs()
    assert_differ([evaluated(twin)], [evaluated(model)])
    assert graphs() == before
    assert not isinstance(unit_of(pickle.loads(pickle.dumps(model))), Precompiled)


def refused(folder: Path, why: str, **settings: Any) -> None:
    """The code is passed over, and nothing of it is unpickled or put anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_ahead", "put_in_place"):
            patch.setattr(f"lora_fx.runtime.artifact.read.{name}", never)
        with pytest.warns(UserWarning, match=why):
            model = lora_fx.load(folder, settings.pop("base", None) or llama(2), **settings)
    assert not isinstance(unit_of(model), Precompiled)


def never(*_: object) -> None:
    raise AssertionError("code of an artifact was used")


def test_foreign_code_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FX_CACHE", str(folder.parent / "somebody-elses"))
    refused(folder, "not trusted without `trust_cache=True`")
    model = lora_fx.load(folder, llama(2), trust_cache=True)
    assert isinstance(unit_of(model), Precompiled)


@pytest.mark.parametrize("mode", [0o622, 0o644, 0o660])
def test_a_list_that_others_can_read_or_write_is_no_list(
    folder: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_FX_CACHE", str(folder.parent))
    digest = read_manifest(folder).code_digest()
    assert trust.trust(digest)
    assert trust.is_trusted(digest)
    path = folder.parent / "trusted_artifacts"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(mode)
    refused(folder, "not trusted")
    assert trust.trust("0" * 64)
    assert path.read_text() == "0" * 64 + "\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_link_is_no_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FX_CACHE", str(folder.parent))
    other = folder.parent / "other"
    other.write_text(read_manifest(folder).code_digest())
    other.chmod(0o600)
    (folder.parent / "trusted_artifacts").symlink_to(other)
    refused(folder, "not trusted")


@pytest.mark.parametrize("part", ["functions", "kernels"])
def test_code_that_was_changed_is_damaged_even_if_it_is_trusted(folder: Path, part: str) -> None:
    path = next(p for p in (folder / layout.CACHE / part).rglob("*") if p.is_file())
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(lora_fx.LoraFxError, match=path.name):
        lora_fx.load(folder, llama(2), trust_cache=True)


def test_code_with_a_hash_of_its_own_making_is_not_trusted(folder: Path) -> None:
    """Whoever changes code and manifest alike has other code than this user wrote."""
    path = next((folder / layout.FUNCTIONS).iterdir())
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    manifest = json.loads((folder / layout.MANIFEST).read_text())
    from lora_fx.runtime.artifact.manifest import hashes

    manifest["files"] = hashes(folder)
    (folder / layout.MANIFEST).write_text(json.dumps(manifest))
    refused(folder, "not trusted")


PARTS = {
    "torch": lambda patch: patch.setattr("torch.__version__", "2.99.0"),
    "transformers": lambda patch: versions(patch, "transformers"),
    "lora_fx": lambda patch: versions(patch, "lora_fx"),
    "Python": lambda patch: patch.setattr("platform.python_version", lambda: "3.99.0"),
    "CPU": lambda patch: patch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX1024"),
    "device": lambda patch: patch.setattr(key, "_device", lambda kind: "another"),
}


def versions(patch: pytest.MonkeyPatch, changed: str) -> None:
    real = key.version
    patch.setattr(key, "version", lambda name: "99.0" if name == changed else real(name))


@pytest.mark.parametrize("part", PARTS)
def test_stale_code_is_not_used(folder: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PARTS[part](monkeypatch)
    refused(folder, f"is for another {part}")


def test_other_rules_make_code_stale(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key, "own_code", lambda: "other rules")
    refused(folder, "is for another lora_fx")


def test_another_model_of_the_same_sizes_makes_code_stale(folder: Path) -> None:
    refused(folder, "is for another base model", base=llama(2, rms_norm_eps=1e-3))
    refused(folder, "is for another base model", base=llama(2).to(torch.bfloat16))


def test_a_spec_that_was_changed_is_damaged(folder: Path) -> None:
    (folder / layout.SPEC).write_text(text().replace("alpha = 6", "alpha = 7"))
    with pytest.raises(lora_fx.LoraFxError, match=layout.SPEC):
        lora_fx.load(folder, llama(2))


def test_code_of_a_model_that_was_replaced_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "rotate_half", lambda x: -x)
        refused(folder, "is for another code of the model")
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x)
        refused(folder, "is for another code of the model")
    with warnings.catch_warnings():
        lora_fx.load(folder, llama(2))


def test_a_source_that_has_changed_on_the_disk_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_fx.runtime.artifact.ahead._text_of", lambda module: "changed")
    model = lora_fx.load(folder, llama(2))
    with pytest.warns(UserWarning, match="compiled now"):
        evaluated(model)


def test_its_adapters_load_like_any_others(artifact: Path) -> None:
    place = artifact / layout.ADAPTERS / "default"
    assert (place / CONFIG).exists()
    model = lora_fx.load(place, llama(2), backend=None)
    assert torch.allclose(evaluated(model), evaluated(marked()), atol=1e-6)


def test_the_base_that_it_names_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama(2).save_pretrained("base")
    spec = text("").replace("lora 1", 'lora 1 model "base" { dtype = bfloat16 }')
    Path("a.lora").write_text(spec)
    lora_fx.build(Path("a.lora"), None, Path("deep/artifact"))
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    model: Any = lora_fx.load("../deep/artifact")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, llama(2).to(torch.bfloat16).lm_head.weight)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(lora_fx.LoraFxError, match="no-model"):
        lora_fx.load("../deep/artifact")


def test_a_base_with_code_of_its_own_is_loaded_only_if_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an artifact says of its base is no reason to run code that lies there."""
    base = tmp_path / "base"
    llama(2).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["Own"],
        "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Own"},
    }
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(OWN)
    spec = text("").replace("lora 1", 'lora 1 model "base" { trust_remote_code = true }')
    (tmp_path / "a.lora").write_text(spec)
    lora_fx.build(tmp_path / "a.lora", None, tmp_path / "out")
    lora_fx.load(tmp_path / "out", backend=None)
    monkeypatch.setenv("LORA_FX_CACHE", str(tmp_path / "somebody-elses"))
    (base / "own.py").write_text("raise SystemExit('code of the base ran')")
    with pytest.raises(lora_fx.LoraFxError, match="code of its own, which is not trusted"):
        lora_fx.load(tmp_path / "out", backend=None)
    with pytest.raises(SystemExit):
        lora_fx.load(tmp_path / "out", backend=None, trust_cache=True)


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = Config
"""


def test_adapters_with_weights_are_taken_along(tmp_path: Path) -> None:
    saved(tmp_path / "trained", text(""), more=1.0)
    (tmp_path / "a.lora").write_text(
        'lora 1 adapter legal { weights = "trained" } adapter other { rank = 3 target v_proj }'
    )
    want = lora_fx.compile(llama(2), tmp_path / "a.lora", backend=None)
    lora_fx.build(tmp_path / "a.lora", llama(2), tmp_path / "out")
    shutil.rmtree(tmp_path / "trained")
    model = lora_fx.load(tmp_path / "out", llama(2), backend=None)
    assert torch.equal(evaluated(model), evaluated(want))
    assert model.active_adapters() == ["legal"]
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in want.parameters()
    ]


def test_without_an_entry_there_is_no_code(tmp_path: Path) -> None:
    base = build(tmp_path / "out", text(""))
    assert not (tmp_path / "out" / layout.CACHE).exists()
    model = lora_fx.load(tmp_path / "out", base, backend="eager")
    assert step(model, tokens()).keys() == step(marked(), tokens()).keys()


@pytest.mark.slow
def test_training_and_generating_from_it(tmp_path: Path) -> None:
    """In a process that has compiled nothing of it; the numbers are those without it."""
    build(tmp_path / "out", text("train generate"))
    manifest = read_manifest(tmp_path / "out")
    assert any(function.grad for function in manifest.functions)
    torch._dynamo.reset()
    model, other = lora_fx.load(tmp_path / "out", llama(2)), marked()
    before = graphs()
    found, want = step(model.train(), tokens(BATCH, LENGTH)), step(other.train(), tokens(3, 11))
    assert found.keys() == want.keys()
    for name in want:
        assert torch.allclose(found[name], want[name], atol=1e-5), name
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    prompts = tokens(BATCH, 9)
    for one in (model, other):
        one.eval()
    assert torch.equal(model.generate(prompts, **settings), other.generate(prompts, **settings))
    assert graphs() == before
