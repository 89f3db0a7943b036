"""The ownership table's last column: FSDP2 shards a compiled model, on two processes of a CPU."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lora_fx
from lora_fx.runtime.merging import run
from tests.tiny import assert_equal, llama, spec, step, tokens

RANKS = 2
REPLICATED = "layers { replicate 0..3, 1..4 }"


@pytest.mark.parametrize("backend", ["eager", None])
@pytest.mark.parametrize(
    ("adapter", "more"),
    [("rank = 4", ""), ("rank = 4", REPLICATED), ("rank = 4 variant = dora", "")],
    ids=["plain", "replicated", "dora"],
)
def test_a_sharded_step_is_the_whole_step(
    tmp_path: Path, backend: str | None, adapter: str, more: str
) -> None:
    text = spec(adapter=f"alpha = 6 {adapter}", more=more)
    mp.spawn(_train, (tmp_path / "rendezvous", backend, text), nprocs=RANKS)


def _train(rank: int, rendezvous: Path, backend: str | None, text: str) -> None:
    torch.set_num_threads(1)
    method = f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=RANKS)
    want = step(lora_fx.compile(llama(4), text, backend=None), tokens())
    model = lora_fx.compile(llama(4), text, backend=backend)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layers in _sharing_weights(model):
        fully_shard(layers, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert type(model.model.layers[0]).__name__ == "FSDPLlamaDecoderLayer"
    got = step(model, tokens())
    assert_equal(
        {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in got.items()}, want
    )
    dist.barrier()
    # Gloo's threads may free tensors while the interpreter ends, which aborts (pytorch PR 179291).
    os._exit(0)


def test_a_sharded_model_is_merged(tmp_path: Path) -> None:
    mp.spawn(_merge, (tmp_path / "rendezvous",), nprocs=RANKS)


def _merge(rank: int, rendezvous: Path) -> None:
    torch.set_num_threads(1)
    run._LARGE, run._AT_ONCE = 0, 64  # as for large weights
    method = f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=RANKS)
    whole, model = (
        lora_fx.compile(llama(2), spec(adapter="rank = 4"), backend=None) for _ in range(2)
    )
    before = {n: p.detach().clone() for n, p in whole.named_parameters()}
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for one in (whole, model):
        one.merge_adapter()
    want = dict(whole.named_parameters())
    changed = 0
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        torch.testing.assert_close(parameter.full_tensor(), want[name])
        changed += name in before and not torch.equal(want[name], before[name])
    assert changed == 2 * 7
    dist.barrier()
    os._exit(0)


def _sharing_weights(model: nn.Module) -> list[list[nn.Module]]:
    """Replicas of one layer go into one group, as FSDP2 asks of modules that share weights."""
    layer_map = model.lora_fx_plan.layer_map
    groups: dict[int, list[nn.Module]] = {}
    for i, layer in enumerate(model.model.layers):
        groups.setdefault(layer_map.old[i] if layer_map else i, []).append(layer)
    return list(groups.values())
