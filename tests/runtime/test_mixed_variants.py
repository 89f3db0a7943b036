"""Variants that add to the loss, in mixed batches: as each does alone, and only if it is there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.dense import relative
from tests.runtime.mixed import mixed, samples
from tests.runtime.test_mixed_training import gradients, losses, of
from tests.tiny import uncached

VARIANTS = {
    "kasa": "kasa(beta = 0.01, gamma = 0.1)",
    "monteclora": "monteclora(num_samples = 4, sample_scaler = 0.3, kl_loss_weight = 0.1)",
}
BACKENDS = [None, "eager", "inductor"]
NAMES = ["k", "a", "__base__", "k", "a"]


def model_of(variant: str, backend: str | None) -> Any:
    """`k` is of the variant, `a` is LoRA, and `other` is of the variant too, elsewhere."""
    spec = f"""lora 1
adapter a {{ rank = 3 init = random target q_proj, up_proj }}
adapter k {{ rank = 2 variant = {VARIANTS[variant]} target q_proj, down_proj }}
adapter other {{ rank = 2 variant = {VARIANTS[variant]} target o_proj }}
route {{ train = true }}"""
    return mixed(spec, backend).train()


def apart(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Each adapter by itself, as `set_adapter` trains it; at most one draws."""
    model.zero_grad()
    for name in ("k", "a"):
        chosen = [i for i, other in enumerate(NAMES) if other == name]
        model.set_adapter(name)
        torch.manual_seed(5)
        loss = losses(model(input_ids=ids[chosen]).logits, ids[chosen]).sum()
        extra = model.auxiliary_loss()
        assert (extra is None) is (name == "a")
        (loss if extra is None else loss + extra).backward()
    return gradients(model)


def together(model: Any, ids: Tensor, *regularised: str) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    loss = losses(model(input_ids=ids, adapter_names=NAMES).logits, ids).sum()
    (loss + model.auxiliary_loss(regularised)).backward()
    return gradients(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kasa_learns_as_it_does_alone(backend: str | None) -> None:
    model, ids = model_of("kasa", backend), samples(len(NAMES))
    got, want = together(model, ids, "k", "a"), apart(model, ids)
    assert any("lora_diag" in name for name in want)
    for name, gradient in want.items():
        assert relative(got[name], gradient) < 2e-5, name
    assert all(of(name, "other") and not got[name].any() for name in got.keys() - want.keys())
    wrong = together(model, ids, "k", "other")
    assert any(wrong[name].any() for name in wrong if of(name, "other"))


def test_monteclora_learns_as_it_does_alone() -> None:
    """With the same draws, which `other` must not be among: it draws its own."""
    model, ids = model_of("monteclora", None), samples(len(NAMES))
    model.delete_adapter("other")
    got, want = together(model, ids, "k", "a"), apart(model, ids)
    assert any("std_prior" in name or "sampler" in name for name in want), list(want)
    for name, gradient in want.items():
        assert relative(got[name], gradient) < 2e-5, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_the_loss_has_what_is_of_the_batch(
    variant: str, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of(variant, backend), samples(len(NAMES))
    added: list[tuple[set[str], Tensor | None]] = []
    auxiliary_loss = model.auxiliary_loss

    def kept(adapters: set[str]) -> Tensor | None:
        added.append((adapters, auxiliary_loss(adapters)))
        return added[-1][1]

    monkeypatch.setattr(model, "auxiliary_loss", kept)

    def extra(*names: str) -> Tensor:
        batch = {"input_ids": ids[: len(names)], "labels": ids[: len(names)]}
        result = model(**batch, adapter_names=names)
        own = torch.nn.functional.cross_entropy(
            result.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        )
        return (result.loss - own).detach()

    for names, present in (NAMES, {"k", "a"}), (["k", "other", "a"], {"k", "other", "a"}):
        got = extra(*names)
        there, value = added[-1]
        assert there == present
        assert value is not None
        assert value > 0.01
        assert relative(got, value) < 1e-4
    assert extra("a", "__base__").abs() < 1e-5
    assert added[-1] == ({"a"}, None)


def test_the_loss_of_several_is_the_sum_of_each_alone() -> None:
    model = model_of("kasa", None)
    both, k, other = (model.auxiliary_loss(names) for names in (["k", "other"], ["k"], ["other"]))
    assert relative(both, k + other) < 1e-6
    assert relative(both, k) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_absent_ones_do_not_move(variant: str) -> None:
    model, ids = model_of(variant, "eager"), samples(len(NAMES))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model(input_ids=ids, labels=ids, adapter_names=NAMES).loss.backward()
    optimizer.step()
    for name, parameter in ((n, p) for n, p in model.named_parameters() if p.requires_grad):
        moved = not torch.equal(parameter, before[name])
        assert moved is not of(name, "other"), name


DIRECTED = ["v", "w", "v", "__base__", "a", "w"]


def directed(backend: str | None, init: str, groups: int, more: str = "") -> Any:
    """`v` and `w` are of the variant, and `other` too, of which there is no sample."""
    variant = f"velora(num_groups = {groups}, init_type = {init}, scale = 1.3)"
    spec = f"""lora 1
adapter v {{ rank = 3 variant = {variant} target q_proj, down_proj }}
adapter w {{ rank = 2 variant = {variant} target q_proj, up_proj }}
adapter a {{ rank = 3 target q_proj }}
adapter other {{ rank = 2 variant = {variant} target q_proj }}
route {{ train = true }}
{more}"""
    return mixed(spec, backend).train()


def directions(model: Any) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "velora" in n}


@pytest.mark.parametrize("init", ["batch_average", "batch_average_once", "random"])
@pytest.mark.parametrize("groups", [4, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_velora_follows_its_own_samples(backend: str | None, groups: int, init: str) -> None:
    """Two steps: gradients and directions are those of a run for each adapter alone."""
    if backend == "inductor" and (groups, init) != (4, "batch_average"):
        pytest.skip("enough of them")
    model, apart = directed(backend, init, groups), directed(None, init, groups)
    begin = directions(model)
    for step in range(2):
        ids = samples(len(DIRECTED)).roll(step, 1)
        model.zero_grad(), apart.zero_grad()
        losses(model(input_ids=ids, adapter_names=DIRECTED).logits, ids).sum().backward()
        for name in ("v", "w", "a"):
            chosen = [i for i, other in enumerate(DIRECTED) if other == name]
            apart.set_adapter(name)
            losses(apart(input_ids=ids[chosen]).logits, ids[chosen]).sum().backward()
        got, want = gradients(model), gradients(apart)
        assert any(of(name, "v") for name in want)
        for name, gradient in want.items():
            assert relative(got[name], gradient) < 2e-5, name
        assert all(of(name, "other") and not got[name].any() for name in got.keys() - want.keys())
        seen = directions(model)
        for name, v in directions(apart).items():
            assert relative(seen[name], v) < 1e-5 if v.any() else not seen[name].any(), name
            if of(name, "other"):
                assert torch.equal(seen[name], begin[name])
    if init != "random":
        model.zero_grad()
        model(input_ids=ids, adapter_names=["w", "v", "v", "__base__", "a", "w"])
        moved = [not torch.equal(v, seen[n]) for n, v in directions(model).items() if of(n, "v")]
        assert any(moved) is (init == "batch_average")


def test_loaded_velora_follows_its_own_samples(tmp_path: Path) -> None:
    directed(None, "batch_average", 4).save_pretrained(tmp_path, selected_adapters=["v"])
    model, apart = (directed(None, "batch_average", 4) for _ in range(2))
    for one in (model, apart):
        one.load_adapter(tmp_path / "v", "late", is_trainable=True)
    ids, names = samples(4), ["late", "w", "__base__", "late"]
    losses(model(input_ids=ids, adapter_names=names).logits, ids).sum().backward()
    apart.set_adapter("late")
    losses(apart(input_ids=ids[[0, 3]]).logits, ids[[0, 3]]).sum().backward()
    got, want = gradients(model), gradients(apart)
    assert any(of(name, "late") for name in want)
    assert all(relative(got[name], gradient) < 2e-5 for name, gradient in want.items())
    seen, own = directions(model), directions(apart)
    late = [name for name in own if of(name, "late")]
    assert late
    assert all(own[name].any() and relative(seen[name], own[name]) < 1e-5 for name in late)


def test_what_is_not_its_own_does_not_reach_a_direction() -> None:
    """Not even what is not a number."""
    model, ids = directed(None, "batch_average", 4), samples(2)
    inputs = model.get_input_embeddings()(ids).detach()
    inputs[1] = float("nan")
    model(inputs_embeds=inputs, adapter_names=["v", "__base__"])
    own = {n: v for n, v in directions(model).items() if of(n, "v")}
    assert own
    assert all(v.isfinite().all() and v.any() for v in own.values())


@pytest.mark.parametrize("more", ["", "compile { checkpoint = layers }"])
def test_no_graph_for_other_directions(more: str) -> None:
    with uncached():
        model, ids = directed("eager", "batch_average", 4, more), samples(len(DIRECTED))
        losses(model(input_ids=ids, adapter_names=DIRECTED).logits, ids).sum().backward()
        before = counters["stats"]["unique_graphs"]
        for names in (DIRECTED[::-1], ["v"] * 6, ["__base__", "other"] * 3):
            losses(model(input_ids=ids, adapter_names=names).logits, ids).sum().backward()
        assert counters["stats"]["unique_graphs"] == before
