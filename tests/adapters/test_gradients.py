"""Gradients of every kind of adapter in float64, beside differences of the loss."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lora_fx.adapters.peft.keys import live_tensors
from lora_fx.graph import references
from lora_fx.graph.row_norms import row_norms
from tests.adapters.varied import IDS, KINDS, compiled

STEP = 1e-5
PADDED = ("embed.weight", "head.weight", "embed.token_adapter.trainable_tokens_delta")


@pytest.fixture
def constant_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA takes no gradient through its norms (arXiv 2402.09353, section 4.3)."""
    fixed: dict[int, Tensor] = {}

    def first(W: Tensor, A: Tensor, B: Tensor, scaling: Tensor) -> Tensor:
        return fixed.setdefault(A.data_ptr(), row_norms(W, A, B, scaling))

    monkeypatch.setattr(references, "row_norms", first)


def loss(model: nn.Module) -> Tensor:
    torch.manual_seed(7)  # dropout
    return model(IDS).square().mean()


def slope(model: nn.Module, leaf: Tensor, direction: Tensor) -> float:
    """The derivative of the loss along a direction, by a central difference."""
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            leaf.add_(sign * STEP * direction)
            ends.append(loss(model).item())
            leaf.sub_(sign * STEP * direction)
    return (ends[0] - ends[1]) / (2 * STEP)


def directions(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each leaf with a direction; the padding token, 0, learns nothing where it is looked up."""
    generator = torch.Generator().manual_seed(5)
    leaves = {t: n for n, t in live_tensors(model, "default").items() if t.is_leaf}
    for leaf, name in leaves.items():
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        if "lora_embedding_A" in name:
            direction[:, 0] = 0
        elif name in PADDED and len(leaf) > 1:
            direction[0] = 0
        if leaf.requires_grad:
            yield name, leaf, direction


# What VeLoRA keeps of its input is compressed, so its gradient is none of the loss.
EXACT = [kind for kind in KINDS if "velora" not in kind]


@pytest.mark.usefixtures("constant_norms")
@pytest.mark.parametrize("kind", EXACT)
def test_beside_differences(kind: str) -> None:
    model = compiled(KINDS[kind], None).double()
    model.counts.eval()
    loss(model).backward()
    named = list(directions(model))
    assert named
    for name, leaf, direction in named:
        analytic = (leaf.grad * direction).sum().item()
        assert abs(analytic) > 1e-7, name
        assert slope(model, leaf, direction) == pytest.approx(analytic, rel=1e-6, abs=1e-9), name


def test_velora_is_no_derivative() -> None:
    """The control: what is compared would notice a gradient that is another one."""
    model = compiled(KINDS["velora"], None).double().train()
    loss(model).backward()
    A = dict(live_tensors(model, "default"))["up.lora_A.weight"]
    direction = torch.ones_like(A)
    analytic = (A.grad * direction).sum().item()
    assert slope(model, A, direction) != pytest.approx(analytic, rel=1e-3)
