"""A weight with adapters as an operand of products: the sum W + Σ s B A is never made.

    x Wᵀ + s (x Aᵀ) Bᵀ      whatever the model computes with W: `linear`, `matmul`, `bmm`, `addmm`,
    x W + s (x B) A         `grouped_mm`; on the whole stack, or on the experts that it picked

Where the model reads a parameter that has adapters it gets this in its place. What it picks of a
stack, `W[e]` or `W[experts]`, is picked of the factors too, so that only experts that run are
computed. A single matrix may go into any other function, added up; a stack may not.

In a mixed batch what is added to each row is multiplied by the shares of its own sample, which the
other operand knows (`routed_rows.py`). Where it does not, and where a matrix is no operand of a
product, that is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.sites.routed_rows import OF_SHAPE, Rows, followed, plain
from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.graph import ops
from lora_fx.graph.grouped import grouped

if TYPE_CHECKING:
    from lora_fx.adapters.sites.parameter_site import ParameterSite

UNSUPPORTED = "the model puts `{}` into `{}`, through which no low-rank product goes here"
UNROUTED = "the model puts `{}` into `{}`, and it is not known which rows are of which sample"
Factors = Sequence[tuple[Tensor, Tensor]]


class AdaptedWeight:
    """One matrix, or a stack of them, that stands for `weight` + Σ s B A.

    `factors` are A (*, r, in) and B (*, out, r) of each active adapter. The weight is (*, out, in),
    or with `turned` (*, in, out). `mixed` says that the samples have adapters of their own, and
    `shares` (R, adapters) is what the rows have that it is multiplied by, once they are known.
    """

    def __init__(
        self,
        weight: Tensor,
        factors: Factors,
        site: "ParameterSite",
        turned: bool,
        mixed: bool = False,
        shares: Tensor | None = None,
    ) -> None:
        self.weight = weight
        self.factors = factors
        self.site = site
        self.turned = turned
        self.mixed = mixed
        self.shares = shares

    def _like(self, weight: Tensor, factors: Factors, turned: bool) -> "AdaptedWeight":
        return AdaptedWeight(weight, factors, self.site, turned, self.mixed, self.shares)

    def of_rows(self, shares: Tensor) -> "AdaptedWeight":
        """Return the weight as it is for rows with these shares (R, adapters)."""
        return AdaptedWeight(self.weight, self.factors, self.site, self.turned, self.mixed, shares)

    def __getattr__(self, name: str) -> Any:
        if name in OF_SHAPE:
            return getattr(self.weight, name)
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(name), name)

    def __len__(self) -> int:
        return len(self.weight)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """Pick matrices of a stack, by a number or a tensor of numbers."""
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim < 2)
        if self.weight.ndim < 3 or not one:
            return self.whole("__getitem__")[index]
        factors = [(A[index], B[index]) for A, B in self.factors]
        return self._like(self.weight[index], factors, self.turned)

    def transpose(self, first: int, second: int) -> Any:
        """Turn the matrices."""
        if {first % self.weight.ndim, second % self.weight.ndim} != {
            self.weight.ndim - 2,
            self.weight.ndim - 1,
        }:
            return self.whole("transpose").transpose(first, second)
        return self._like(self.weight.transpose(-2, -1), self.factors, not self.turned)

    def t(self) -> Any:
        """Turn the one matrix."""
        return self.transpose(0, 1)

    @property
    def T(self) -> Any:
        """The one matrix turned."""
        return self.transpose(0, 1)

    @property
    def mT(self) -> Any:
        """The matrices turned."""
        return self.transpose(-2, -1)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Convert the weight; factors are converted where they are used."""
        return self._like(self.weight.to(*args, **kwargs), self.factors, self.turned)

    def __matmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(self, x)  # type: ignore[arg-type]

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self)  # type: ignore[arg-type]

    def whole(self, use: str) -> Tensor:
        """Return the sum of weight and products, for a `use` that is no product of the matrix.

        Raises LoraFxError for a stack, and in a mixed batch.
        """
        if self.weight.ndim > 2 or self.mixed:
            self._refuse(UNSUPPORTED if self.weight.ndim > 2 else UNROUTED, use)
        scalings = self.site.lora_scalings
        total = self.weight
        for i, (A, B) in enumerate(self.factors):
            delta = scalings[i] * (B @ A)
            total = total + (delta.t() if self.turned else delta).to(total.dtype)
        return total

    def _refuse(self, message: str, use: str) -> None:
        message = message.format(self.site.lora_name, use)
        if torch.compiler.is_compiling():  # Dynamo does not trace the making of a LoraFxError
            raise TypeError(message)
        raise unsupported_use(message)

    def times(self, y: Tensor, x: Tensor, over_last: bool, offsets: Tensor | None = None) -> Tensor:
        """Add to y, which is x by the weight, what x by the products is.

        The product runs over the last dimension of the weight, or over the one before.
        """
        over_inputs = over_last is not self.turned
        pairs = self.factors if over_inputs else [(B.mT, A.mT) for A, B in self.factors]
        kind = "linear" if self.weight.ndim < 3 else "batched"
        kind, base = (kind, []) if offsets is None else ("grouped", [offsets])
        params = [factor for pair in pairs for factor in pair]
        if not self.mixed:
            return ops.site(y, x, params, self.site.lora_scalings, self.site.lora_keys[kind], base)
        if self.shares is None:
            self._refuse(UNROUTED, kind)
        key, scalings = self.site.lora_mixed_keys[kind], self.site.lora_mixed_scalings
        return ops.site(y, x, params, scalings, key, base, self.shares)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute a function of which one argument is such a weight."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        rows = [one for one in args if isinstance(one, Rows)]
        given = args
        if rows:
            given = tuple(_of_rows(plain(one), rows[0].shares) for one in args)
        rule = _rule(func)
        result = None if rule is None else rule(*given, **kwargs)
        if result is not None:
            return followed(name, args, kwargs, result) if rows else result
        return func(*(_added_up(a, name) for a in given), **_named(kwargs, name))


def _of_rows(value: Any, shares: Tensor) -> Any:
    return value.of_rows(shares) if isinstance(value, AdaptedWeight) else value


def _added_up(value: Any, use: str) -> Any:
    return value.whole(use) if isinstance(value, AdaptedWeight) else value


def _named(kwargs: dict[str, Any], use: str) -> dict[str, Any]:
    return {name: _added_up(value, use) for name, value in kwargs.items()}


def unsupported_use(message: str, place: Span | None = None) -> LoraFxError:
    """Return the error for a stack that the model computes with in an unknown way."""
    help = "leave the parameter out of the target"
    return LoraFxError((Diagnostic("unsupported-use", message, place, help=help),))


# Each returns None for a call that it does not know.


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    if isinstance(input, AdaptedWeight) or weight.ndim != 2:
        return None
    return weight.times(F.linear(input, weight.weight, bias), input, True)


def _matmul(a: Any, b: Any) -> Tensor | None:
    if isinstance(b, AdaptedWeight):
        if isinstance(a, AdaptedWeight) or not _fits(a, b):
            return None
        return b.times(torch.matmul(a, b.weight), a, False)
    if b.ndim == 1:
        return a.times(torch.matmul(a.weight, b), b, True) if a.ndim == 2 else None
    if not _fits(b, a):
        return None
    return a.times(torch.matmul(a.weight, b).mT, b.mT, True).mT


def _operator(a: Any, b: Any) -> Tensor | None:
    """Compute `a @ b`; Dynamo puts the tensor first, whichever was: then the shapes have to tell.

    Where they do not, it refuses.
    """
    if not torch.compiler.is_compiling() or not isinstance(b, AdaptedWeight):
        return _matmul(a, b)
    straight = a.shape[-1] == b.shape[-2]
    reversed = a.shape[-2 if a.ndim > 1 else -1] == b.shape[-1]
    if straight and reversed:
        raise TypeError(UNSUPPORTED.format(b.site.lora_name, "a @ b"))
    return _matmul(a, b) if straight else _matmul(b, a)


def _fits(x: Tensor, weight: AdaptedWeight) -> bool:
    """Whether rows go by one matrix, or each slice of them by its own."""
    return weight.ndim == 2 or (x.ndim == 3 and x.shape[0] == weight.shape[0])


def _reversed_matmul(b: Any, a: Any) -> Tensor | None:
    return _matmul(a, b)


def _addmm(input: Any, a: Any, b: Any) -> Tensor | None:
    if not isinstance(b, AdaptedWeight) or isinstance(input, AdaptedWeight):
        return None
    return b.times(torch.addmm(input, a, b.weight), a, False)


def _grouped_mm(
    x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Tensor | None:
    if not isinstance(weight, AdaptedWeight) or weight.ndim != 3 or offs is None or x.ndim != 2:
        return None
    y = F.grouped_mm(x, weight.weight, offs=offs, bias=bias, out_dtype=out_dtype)
    return weight.times(y, x, False, offs)


def _grouped_of_transformers(input: Any, weight: Any, offs: Any) -> Tensor | None:
    """Multiply by our operator, which gives a frozen stack no gradient."""
    if not isinstance(weight, AdaptedWeight):
        return None
    return weight.times(grouped(input, weight.weight, offs), input, False, offs)


@cache
def let_dynamo_ask() -> None:
    """Have Dynamo ask a weight about `grouped_mm` too, as it does about every other product.

    It does so for what torch lists as overridable, and that is not among it. For plain tensors the
    function is what it was. `test_in_bfloat16` holds the private name of its operator.
    """

    @torch.compiler.substitute_in_graph(F.grouped_mm, skip_signature_check=True)  # type: ignore[arg-type]
    def _(mat_a: Any, mat_b: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None):
        named = {"offs": offs, "bias": bias, "out_dtype": out_dtype}
        if isinstance(mat_b, AdaptedWeight):
            return AdaptedWeight.__torch_function__(F.grouped_mm, (), (mat_a, mat_b), named)
        return torch.ops.aten._grouped_mm(mat_a, mat_b, offs, bias, out_dtype)


_RULES: tuple[tuple[tuple[str, ...], Callable[..., Tensor | None]], ...] = (
    (("linear",), _linear),
    (("matmul", "__matmul__"), _operator),
    (("mm", "bmm"), _matmul),
    (("__rmatmul__",), _reversed_matmul),
    (("addmm",), _addmm),
    (("grouped_mm", "_grouped_mm"), _grouped_mm),
    (("grouped_mm_fallback", "grouped_mm_fallback.default"), _grouped_of_transformers),
)


def _rule(func: Any) -> Callable[..., Tensor | None] | None:
    if func is torch.matmul:
        return _matmul
    name = getattr(func, "__name__", "")
    for names, rule in _RULES:
        if name in names:
            return rule
    return None
