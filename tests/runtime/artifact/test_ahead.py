"""What is relied on of torch's experimental `aot_compile`, on a function of our own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.runtime.artifact.ahead import AheadFunction, compile_ahead, load_ahead, writable
from tests.tiny import graphs


class Scale(nn.Module):
    """Depends on an attribute, on the mode and on a weight."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight * self.factor if self.training else x


def run(module: Scale, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def compiled(call: tuple[Any, ...], **settings: Any) -> AheadFunction | None:
    options = {"guard_filter_fn": writable}
    return compile_ahead(torch.compile(run, fullgraph=True, options=options, **settings), call)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    function = compiled((Scale(2.0), torch.ones(5, 3)))
    assert function is not None
    path = tmp_path_factory.mktemp("functions") / "0"
    function.save(path)
    return path.read_bytes()


def loaded(data: bytes) -> AheadFunction:
    function = load_ahead(data)
    assert function is not None
    return function


def test_it_serves_other_modules_and_other_values(written: bytes) -> None:
    before = graphs()
    function, module, x = loaded(written), Scale(2.0), torch.rand(5, 3)
    with torch.no_grad():
        module.weight.mul_(3.0)
    assert function.matches(module, x)
    result = function(module, x)
    assert torch.allclose(result, x * 6.0)
    result.sum().backward()
    assert torch.allclose(module.weight.grad, 2.0 * x.sum(0))  # type: ignore[arg-type]
    assert graphs() == before


def test_its_guards_hold(written: bytes) -> None:
    function, x = loaded(written), torch.ones(5, 3)
    assert function.matches(Scale(2.0), x)
    assert not function.matches(Scale(2.5), x)
    assert not function.matches(Scale(2.0).eval(), x)
    assert not function.matches(Scale(2.0), torch.ones(6, 3))
    assert not function.matches(Scale(2.0), x.double())
    assert not function.matches(Scale(2.0), x.clone().requires_grad_())
    assert not function.matches(Scale(2.0).requires_grad_(False), x)
    assert not function.matches(nn.Identity(), x)
    with torch.no_grad():
        assert not function.matches(Scale(2.0), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not function.matches(Scale(2.0), x)


def test_sizes_that_are_symbols(tmp_path: Path) -> None:
    function = compiled((Scale(2.0), torch.ones(5, 3)), dynamic=True)
    assert function is not None
    function.save(tmp_path / "0")
    function = loaded((tmp_path / "0").read_bytes())
    for size in (2, 7, 300):
        assert function.matches(Scale(2.0), torch.ones(size, 3))
        assert function(Scale(2.0), torch.ones(size, 3)).shape == (size, 3)


def test_sources_are_compared(written: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_fx.runtime.artifact.ahead._text_of", lambda module: "changed")
    assert load_ahead(written) is None


def test_what_is_no_function_is_none() -> None:
    assert load_ahead(b"nothing of that kind") is None


def test_what_cannot_be_captured_is_none() -> None:
    def breaks(module: Scale, x: torch.Tensor) -> torch.Tensor:
        print(x.sum().item())
        return module(x)

    entry = torch.compile(breaks, fullgraph=True)
    assert compile_ahead(entry, (Scale(2.0), torch.ones(5, 3))) is None
