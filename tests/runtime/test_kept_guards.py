"""A graph is called with fewer guards than Dynamo makes, and is not used where it is wrong."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lora_fx
from lora_fx.adapters.sites.choice import Added, choose
from lora_fx.adapters.sites.factors import Arithmetic, Compression, Factors
from lora_fx.runtime.units import unit
from lora_fx.runtime.units.kept_guards import kept_guards
from tests.dense import adapted_linear, relative

TWO = """lora 1
adapter a { rank = 3 alpha = 6 init = random  target linear }
adapter b { rank = 3 alpha = 2 init = random  target linear }
"""


def compiled(text: str) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    return lora_fx.compile(base, text, backend="eager").eval()


def dense(model: Any, x: Tensor, adapter: str, alpha: float) -> Tensor:
    tensors = dict(model.named_parameters())
    for i in range(2):
        A, B = (tensors[f"{i}.lora_{name}.{adapter}.weight"].double() for name in "AB")
        branch = (alpha / A.shape[0], A, B)
        x = adapted_linear(x, tensors[f"{i}.weight"].double(), tensors[f"{i}.bias"], [branch])
    return x


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("mixed", [False, True])
def test_what_follows_is_left_out(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    def recorded(guards: Any) -> list[bool]:
        found = kept_guards(guards)
        kept.extend(guard for guard, keep in zip(guards, found, strict=True) if keep)
        assert not all(found)
        return found

    monkeypatch.setattr(unit.Unit.entry, "__defaults__", (recorded,))
    model = compiled(TWO + "route { }")
    model(torch.randn(2, 6), **({"adapter_names": ["a", "b"]} if mixed else {}))
    which = "lora_mixed" if mixed else "lora_choice"
    names = [guard.name for guard in kept]
    assert sum(name.endswith(f".{which}_form") for name in names) == 2
    assert not [name for name in names if "lora_routing" in name or f".{which}." in name]
    tensors = [guard.name for guard in kept if guard.guard_type == "TENSOR_MATCH"]
    factors = [name for name in tensors if f".{which}_modules[" in name]
    assert len(set(factors)) == (8 if mixed else 4)


def test_other_tensors_and_scalings_are_served_by_the_same_graph() -> None:
    model, x = compiled(TWO), torch.randn(3, 6)
    model.set_adapter("a")
    got = model(x)
    assert relative(got, dense(model, x, "a", 6)) < 1e-6
    before = graphs()
    model.set_adapter("b")
    assert relative(model(x), dense(model, x, "b", 2)) < 1e-6
    assert relative(got, dense(model, x, "b", 2)) > 0.01
    assert graphs() == before


@pytest.mark.parametrize("other", ["rank = 2 alpha = 2", "rank = 3 alpha = 2 lora_bias = true"])
def test_another_form_gets_another_graph(other: str) -> None:
    model, x = compiled(TWO.replace("rank = 3 alpha = 2", other)), torch.randn(3, 6)
    model.set_adapter("a")
    model(x)
    before = graphs()
    model.set_adapter("b")
    assert relative(model(x), dense(model, x, "b", 2)) < 1e-6
    assert graphs() > before


def test_without_adapters_the_base_is_computed() -> None:
    model, x = compiled(TWO), torch.randn(3, 6)
    model.set_adapter("a")
    adapted = model(x)
    with model.disable_adapter():
        off = model(x)
    plain = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert torch.equal(off, nn.functional.linear(plain, model[1].weight, model[1].bias))
    assert relative(adapted, off) > 0.01
    assert torch.equal(model(x), adapted)


def test_a_factor_that_is_trained_from_now_on() -> None:
    model, x = compiled(TWO), torch.randn(3, 6)
    model.set_adapter("a")
    A = dict(model.named_parameters())["0.lora_A.a.weight"]
    A.requires_grad_(False)
    model(x).sum().backward()
    assert A.grad is None
    A.requires_grad_(True)
    model(x).sum().backward()
    assert A.grad is not None
    assert A.grad.norm() > 0


def test_another_dtype() -> None:
    model, x = compiled(TWO), torch.randn(3, 6)
    model.set_adapter("a")
    model(x)
    got = model.double()(x.double())
    assert got.dtype == torch.float64
    assert relative(got, dense(model, x.double(), "a", 6)) < 1e-12


class Scaled(nn.Module):
    """Its `forward`, which subclasses inherit, reads what it closes over, and has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)


def scaled_by(factor: float) -> tuple[type, Any]:
    def forward(self: Any, x: Tensor, more: float = 1.0) -> Tensor:
        return self.layer(x) * factor * more

    def put(value: float) -> None:
        nonlocal factor
        factor = value

    parent = type("Parent", (Scaled,), {"forward": forward})
    return type("Child", (parent,), {}), put


def test_what_functions_of_the_model_close_over_is_looked_at() -> None:
    cls, put = scaled_by(2.0)
    text = "lora 1 adapter a { rank = 3 init = random target linear }"
    model: Any = lora_fx.compile(nn.Sequential(cls()), text, backend="eager").eval()
    x = torch.randn(3, 6)
    got = model(x)
    put(4.0)
    assert torch.equal(model(x), 2 * got)
    cls.__mro__[1].forward.__defaults__ = (3.0,)
    assert relative(model(x), 6 * got) < 1e-6


def branch(**more: Any) -> Added:
    A, B = nn.Linear(6, 3, bias=False), nn.Linear(3, 5, bias=False)
    arithmetic = Arithmetic(5, 2.0, False, 0.0, "activation")
    return Added(Factors(A, B), replace(arithmetic, **more), column=0)  # type: ignore[arg-type]


def test_a_form_is_all_but_tensors_and_scalings() -> None:
    one = branch()
    form = choose("linear", [one]).form
    assert choose("linear", [branch(scaling=7.0, alpha=3)]).form == form
    assert choose("linear", []).form == ""
    vector, tied = nn.Linear(3, 1), replace(one.factors, tied=True)
    others = [
        [branch(dropout=0.1)],
        [branch(compute="float32")],
        [branch(blocks=(1, 3))],
        [branch(drawn=(2, 0.5))],
        [branch(compression=Compression(2, 0.5, "random"))],
        [branch(compression=Compression(2, 0.5, "batch_average"))],
        [replace(one, column=1)],
        [replace(one, rest=True)],
        [replace(one, invoked=0)],
        [replace(one, factors=tied)],
        [replace(one, factors=replace(one.factors, magnitude=vector))],  # type: ignore[arg-type]
        [replace(one, factors=replace(one.factors, diagonal=vector))],  # type: ignore[arg-type]
        [replace(one, factors=replace(one.factors, direction=vector))],  # type: ignore[arg-type]
        [one, one],
    ]
    forms = [choose("linear", some).form for some in others]
    assert len({form, *forms, choose("transposed", [one]).form}) == len(forms) + 2
