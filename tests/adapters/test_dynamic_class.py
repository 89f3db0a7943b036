"""A made class is its base class to everyone who looks, and can be pickled."""

import copy
import inspect
import pickle

import torch
from torch import nn

from lora_fx.adapters.dynamic_class import base_of, specialise, subclass


class Doubled:
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)  # type: ignore[misc]


class Silent:
    seen = True


def test_it_looks_like_its_base() -> None:
    made = subclass(nn.Linear, Doubled)
    assert issubclass(made, nn.Linear)
    assert issubclass(made, Doubled)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(made, name) == getattr(nn.Linear, name)
    assert inspect.signature(made.forward) == inspect.signature(nn.Linear.forward)
    assert inspect.signature(Doubled.forward) != inspect.signature(made.forward)


def test_equal_pairs_are_one_class() -> None:
    assert subclass(nn.Linear, Doubled) is subclass(nn.Linear, Doubled)
    assert subclass(nn.Linear, Doubled) is not subclass(nn.Linear, Silent)
    assert subclass(nn.Linear, Doubled) is not subclass(nn.Bilinear, Doubled)


def test_a_live_module_keeps_everything_but_its_class() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(5, 7), torch.randn(3, 5)
    weight, before = linear.weight, linear(x)
    linear.register_forward_hook(lambda module, args, output: output + 1)
    specialise(linear, Doubled)
    assert isinstance(linear, nn.Linear)
    assert linear.weight is weight
    assert torch.equal(linear(x), 2 * before + 1)
    assert repr(linear).startswith("Linear(in_features=5, out_features=7")


def test_copies_and_pickles_are_of_the_same_class() -> None:
    linear, x = nn.Linear(5, 7), torch.randn(3, 5)
    specialise(linear, Doubled)
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert type(twin) is type(linear)
        assert torch.equal(twin(x), linear(x))
        assert twin.weight is not linear.weight


def test_classes_stack_up_and_come_apart() -> None:
    twice = subclass(subclass(nn.Linear, Doubled), Silent)
    assert twice.seen
    assert base_of(twice) is nn.Linear
    assert base_of(nn.Linear) is nn.Linear
    assert pickle.loads(pickle.dumps(twice)) is twice
    assert twice.__name__ == "Linear"
    assert inspect.signature(twice.forward) == inspect.signature(nn.Linear.forward)
