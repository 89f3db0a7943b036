"""Every product of a model with a parameter: as with W + s B A, and never by the sum."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.sites.parameter_site import ParameterSite
from tests.adapters.kinds import scatter
from tests.dense import relative

E, WIDE, HIGH = 3, 5, 7
IDS = torch.tensor([2, 0, 2, 2])
ENDS = torch.tensor([3, 3, 4], dtype=torch.int32)
Use = Callable[[nn.Module, Tensor], Tensor]


class Uses(nn.Module):
    """A matrix and two stacks, of (out, in) and (in, out), and one way to compute with them."""

    is_transposed = False

    def __init__(self, use: Use, turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(HIGH, WIDE))
        shape = (E, WIDE, HIGH) if turned else (E, HIGH, WIDE)
        self.stack = nn.Parameter(torch.randn(shape))
        self.is_transposed = turned
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def rows(x: Tensor, width: int = WIDE) -> Tensor:
    return x[:, :width]


USES: dict[str, Use] = {
    "linear": lambda m, x: F.linear(rows(x), m.matrix, x[0, :HIGH]),
    "matmul with T": lambda m, x: rows(x) @ m.matrix.T,
    "matmul": lambda m, x: rows(x, HIGH) @ m.matrix,
    "matmul of a vector": lambda m, x: x[0, :HIGH] @ m.matrix,
    "matmul from the left": lambda m, x: m.matrix @ rows(x).t(),
    "matmul with a vector": lambda m, x: torch.matmul(m.matrix, x[0, :WIDE]),
    "mm with t": lambda m, x: torch.mm(rows(x), m.matrix.t()),
    "addmm": lambda m, x: torch.addmm(x[0, :WIDE], rows(x, HIGH), m.matrix),
    "with another dtype": lambda m, x: F.linear(rows(x), m.matrix.to(x.dtype)),
    "rows picked": lambda m, x: m.matrix[IDS] * rows(x),
    "something else": lambda m, x: (rows(x).unsqueeze(1) * torch.tanh(m.matrix)).sum(-1),
    "one expert": lambda m, x: F.linear(rows(x), m.stack[1]),
    "one expert by a tensor": lambda m, x: F.linear(rows(x), m.stack[IDS[0]]),
    "each expert": lambda m, x: torch.cat([F.linear(rows(x), one) for one in m.stack]),
    "experts picked, bmm": lambda m, x: torch.bmm(m.stack[IDS], rows(x).unsqueeze(-1)),
    "experts picked, by rows": lambda m, x: torch.bmm(rows(x).unsqueeze(1), m.stack[IDS].mT),
    "experts picked, over outputs": lambda m, x: rows(x, HIGH).unsqueeze(1) @ m.stack[IDS],
    "all experts": lambda m, x: torch.bmm(rows(x).expand(E, -1, -1), m.stack.transpose(1, 2)),
    "all experts from the left": lambda m, x: m.stack @ rows(x).t().expand(E, -1, -1),
    "half of an expert": lambda m, x: F.linear(rows(x), m.stack[1].chunk(2)[0]),
    "transformers' groups": lambda m, x: torch.ops.transformers.grouped_mm_fallback(
        rows(x), m.stack.transpose(-2, -1), ENDS
    ),
    "transformers' groups, over outputs": lambda m, x: torch.ops.transformers.grouped_mm_fallback(
        rows(x, HIGH), m.stack, ENDS
    ),
}
TURNED: dict[str, Use] = {
    "one expert": lambda m, x: rows(x) @ m.stack[1],
    "experts picked": lambda m, x: torch.bmm(rows(x).unsqueeze(1), m.stack[IDS]),
    "over outputs": lambda m, x: F.linear(rows(x, HIGH), m.stack[1]),
    "transformers' groups": lambda m, x: torch.ops.transformers.grouped_mm_fallback(
        rows(x), m.stack, ENDS
    ),
}
CASES = [(name, False) for name in USES] + [(name, True) for name in TURNED]


def base(name: str, turned: bool) -> Uses:
    return Uses((TURNED if turned else USES)[name], turned)


def adapted(name: str, turned: bool, backend: str | None) -> nn.Module:
    text = """lora 1 adapter default { rank = 2 alpha = 3 init = random
    target parameter "matrix", parameter "stack" }"""
    model = lora_fx.compile(base(name, turned), text, backend=backend)
    scatter(model)
    return model


def sums(model: nn.Module) -> dict[str, Tensor]:
    """W + 1.5 B A of each parameter, expert by expert, as a function of A and B."""
    found = {}
    for name, site in storage.sites(model):
        assert isinstance(site, ParameterSite)
        A, B = (factors["default"].weight for factors in (site.lora_A, site.lora_B))
        if name == "matrix":
            delta = B @ A
        else:
            each = [B[:, e::E] @ A[2 * e : 2 * e + 2] for e in range(E)]
            delta = torch.stack([one.T if site.lora_layer.turned else one for one in each])
        found[name] = site.weight.detach() + 1.5 * delta
    return found


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize(("name", "turned"), CASES)
def test_as_with_the_sum(name: str, turned: bool, backend: str | None) -> None:
    if backend and name == "one expert by a tensor":
        pytest.skip("torch captures no index that is one number in a tensor")
    model, plain = adapted(name, turned, backend), base(name, turned)
    x = torch.randn(4, HIGH + 2, requires_grad=True)
    leaves = [p for p in model.parameters() if p.requires_grad]
    got, want = model(x), torch.func.functional_call(plain, sums(model), (x,))
    weights = torch.randn(want.shape)
    wanted = torch.autograd.grad((want * weights).sum(), [x, *leaves], allow_unused=True)
    found = torch.autograd.grad((got * weights).sum(), [x, *leaves], allow_unused=True)
    assert relative(got, want) < 1e-5
    assert relative(want, plain(x)) > 1e-2
    assert sum(grad is not None and grad.norm() > 1e-3 for grad in wanted) == 3
    for grad, reference in zip(found, wanted, strict=True):
        zero = reference is None or grad is None
        assert zero or relative(grad, reference) < 1e-5
        assert not zero or all(one is None or not one.any() for one in (grad, reference))


def test_which_side_it_stood_on_is_not_guessed() -> None:
    """Dynamo tells only the operands of `@`, not their order."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.w @ x

    text = 'lora 1 adapter default { rank = 2 init = random target parameter "w" }'
    x = torch.randn(5, 5)
    base = Square()
    marked = lora_fx.compile(base, text, backend=None)
    assert relative(marked(x), marked._parameters["w"] @ x) > 1e-2
    (_, site), *_ = storage.sites(marked)
    A, B = (factors["default"].weight for factors in (site.lora_A, site.lora_B))
    scaling = site.lora_arithmetic["default"].scaling
    assert relative(marked(x), (base.w + scaling * (B @ A)) @ x) < 1e-5
    with pytest.raises(lora_fx.LoraFxError, match="a @ b") as raised:
        lora_fx.compile(base, text, backend="eager")(x)
    assert {d.code for d in raised.value.diagnostics} == {"unsupported-use"}


@pytest.mark.parametrize(("name", "turned"), CASES)
def test_gradients_as_finite_differences(name: str, turned: bool) -> None:
    model = adapted(name, turned, None).double()
    leaves = tuple(p for p in model.parameters() if p.requires_grad)
    x = torch.randn(4, HIGH + 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *leaves))


class Largest(TorchDispatchMode):
    """Notes how many elements the largest result has that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.parametrize(
    "name", ["one expert", "all experts", "each expert", "transformers' groups", "matmul"]
)
def test_nothing_as_large_as_the_stack_is_made(name: str) -> None:
    """Not in the forward, and not for the gradients."""
    model = adapted(name, False, None)
    x = torch.randn(4, HIGH + 2)
    with Largest() as seen:
        model(x).sum().backward()
    size = model._parameters["matrix" if name == "matmul" else "stack"].numel()
    assert 0 < seen.elements < (3 * size if name == "matmul" else size)


def test_only_experts_that_run_get_gradients() -> None:
    model = adapted("one expert", False, None)
    model(torch.randn(4, HIGH + 2)).sum().backward()
    (site,) = (site for name, site in storage.sites(model) if name == "stack")
    A, B = site.lora_A["default"].weight.grad, site.lora_B["default"].weight.grad
    assert [bool(A[2 * e : 2 * e + 2].any()) for e in range(E)] == [False, True, False]
    assert [bool(B[:, e::E].any()) for e in range(E)] == [False, True, False]
