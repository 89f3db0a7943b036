"""The clone shares base storage and nothing else."""

import torch
from torch import nn

from lora_fx.adapters.weights.clone import clone
from tests.quantised import nf4
from tests.tiny import llama


class Tied(nn.Module):
    """One weight under two names, one module under two, a buffer, an alias kept in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.b = nn.Linear(5, 5)
        self.b.weight = self.a.weight
        self.again = self.a
        self.register_buffer("shift", torch.arange(5.0))
        self.kept = [self.a.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.again(x)) + self.shift


def test_storage_is_shared_and_parameters_are_not() -> None:
    model = Tied()
    twin = clone(model)
    assert twin.a.weight is not model.a.weight
    assert twin.a.weight.data_ptr() == model.a.weight.data_ptr()
    assert twin.shift.data_ptr() != model.shift.data_ptr()
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in twin.parameters())
    x = torch.randn(3, 5)
    assert torch.equal(twin(x), model(x))


def test_ties_stay_within_the_clone() -> None:
    twin = clone(Tied())
    assert twin.a.weight is twin.b.weight
    assert twin.kept[0] is twin.a.weight
    assert twin.again is twin.a


def test_gradients_and_modes() -> None:
    model = Tied()
    model.b.eval()
    model(torch.randn(3, 5)).sum().backward()
    twin = clone(model)
    assert [m.training for m in twin.modules()] == [m.training for m in model.modules()]
    assert all(p.grad is None for p in twin.parameters())
    twin.to(torch.float64).requires_grad_(True)
    assert model.a.weight.dtype is torch.float32
    assert model.a.weight.grad is not None


def test_packed_weights_share_bytes_and_own_their_state() -> None:
    model = nf4(llama())
    twin = clone(model)
    for name, module in model.named_modules():
        if not hasattr(module, "compute_dtype"):
            continue
        other = twin.get_submodule(name)
        old, new = module.weight, other.weight
        assert type(new) is type(old)
        assert new.data_ptr() == old.data_ptr()
        assert (old.module, new.module) == (module, other)
        assert new.quant_state is not old.quant_state
        assert new.quant_state.state2 is not old.quant_state.state2
        assert other.quant_state is new.quant_state
        x = torch.randn(3, module.in_features)
        assert torch.equal(other(x), module.train()(x))
