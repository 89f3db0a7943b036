"""Rows of a mixed batch that know what each adapter has in them, wherever a module puts them.

A mixture of experts lays the tokens of all samples one behind the other, and gives them to experts
in an order of its own. In a mixed batch the first tensor that such a module gets is given to it as
`Rows`: what the module picks of it, and computes of it row by row, is `Rows` too, with the shares
picked likewise, up to the products with adapted parameters, which need them. What any other
function returns is a plain tensor again, and such products refuse that (`graph/rows.py`).
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_fx.graph.own_tensors import require_samples
from lora_fx.graph.rows import rows_after

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object

OF_SHAPE = (
    *("dtype", "device", "layout", "shape", "ndim", "requires_grad", "is_cuda", "is_meta"),
    *("dim", "size", "numel", "stride", "is_contiguous", "is_floating_point", "element_size"),
    "data_ptr",
)


class Rows:
    """A tensor (R, …), and the `shares` (R, adapters) that adapters have in its rows."""

    def __init__(self, tensor: Tensor, shares: Tensor) -> None:
        self.tensor = tensor
        self.shares = shares

    def __getattr__(self, name: str) -> Any:
        if name in OF_SHAPE:
            return getattr(self.tensor, name)
        if name.startswith("__"):
            raise AttributeError(name)
        return _Method(self, name)

    @property
    def T(self) -> Tensor:
        """The tensor turned: its rows are no rows any more."""
        return self.tensor.T

    @property
    def mT(self) -> Tensor:
        """The tensor's matrices turned."""
        return self.tensor.mT

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.tensor)

    def __bool__(self) -> bool:
        return bool(self.tensor)

    def __iter__(self) -> Any:
        return iter(self.tensor)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute a function of plain tensors, and say whose the rows of its result are."""
        if any(one is not cls and not issubclass(one, Tensor) for one in types):
            return NotImplemented
        return follow(func, getattr(func, "__name__", ""), args, kwargs or {})


class _Method:
    """A method of the tensor."""

    def __init__(self, rows: Rows, name: str) -> None:
        self.rows = rows
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _call(self.name, (self.rows, *args), kwargs)


def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name in ("matmul", "mm", "bmm"):  # the other may be an adapted weight
        return getattr(torch, name)(*args, **kwargs)
    return follow(getattr(torch.Tensor, name), name, args, kwargs)


def follow(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a function of which some arguments are Rows."""
    result = func(*(plain(a) for a in args), **{k: plain(v) for k, v in kwargs.items()})
    return followed(name, args, kwargs, result)


def followed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Return what a function has computed as Rows, where it is known whose they are."""
    place = _place(args)
    if place is None:
        return result
    shares, given = args[place].shares, [plain(a) for a in args]
    if isinstance(result, tuple | list):
        return tuple(_as_rows(name, place, shares, given, kwargs, one) for one in result)
    return _as_rows(name, place, shares, given, kwargs, result)


def _as_rows(
    name: str, place: int, shares: Tensor, args: list[Any], kwargs: dict[str, Any], result: Any
) -> Any:
    found = rows_after(name, place, shares, args, kwargs, result)
    return result if found is None else Rows(result, found)


def _place(args: tuple[Any, ...]) -> int | None:
    """Return where the Rows stand, None if there are none, or several of different rows."""
    places = [i for i, one in enumerate(args) if isinstance(one, Rows)]
    if not places or any(args[i].shares is not args[places[0]].shares for i in places):
        return None
    return places[0]


def plain(value: Any) -> Any:
    """Return the tensor of Rows, and all else, in tuples and lists too, as it is."""
    if isinstance(value, Rows):
        return value.tensor
    if isinstance(value, tuple | list):
        return type(value)([plain(one) for one in value]) if type(value) in (tuple, list) else value
    return value


def _operator(name: str) -> Any:
    def compute(self: Rows, *args: Any) -> Any:
        return _call(name, (self, *args), {})

    return compute


for _name in (
    *("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "pow", "neg"),
    *("truediv", "rtruediv", "itruediv", "getitem", "invert", "and", "or"),
    *("eq", "ne", "lt", "le", "gt", "ge", "mod", "floordiv", "abs"),
):
    setattr(Rows, f"__{_name}__", _operator(f"__{_name}__"))


class RowsFollowed(_Base):
    """Mixin for a module with adapted parameters: in a mixed batch it gets its input as Rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the module does; of what it returns nothing is Rows."""
        shares = self._shares()
        if shares is None:
            return super().forward(*args, **kwargs)
        args, kwargs = _with_rows(shares, args, kwargs)
        return plain(super().forward(*args, **kwargs))

    def _shares(self) -> Tensor | None:
        """Return the shares of a mixed batch if anything here can differ from sample to sample."""
        for site in self._modules["lora_parameters"].values():  # type: ignore[union-attr]
            routing = site.lora_routing
            if routing is not None and routing.mixes and site.lora_mixed is not None:
                return routing.shares
        return None


def _with_rows(
    shares: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a module the first tensor that it gets as Rows: of samples, or of tokens of each."""
    if args and isinstance(args[0], Tensor):
        return (_rows(args[0], shares), *args[1:]), kwargs
    for name, value in kwargs.items():
        if not args and isinstance(value, Tensor):
            return args, {**kwargs, name: _rows(value, shares)}
    return args, kwargs


def _rows(x: Tensor, shares: Tensor) -> Rows:
    samples, shares = shares.shape[0], shares.to(x.device)
    if x.shape[0] == samples:
        return Rows(x, shares)
    tokens = x.shape[0] // samples
    require_samples(x.shape[0], samples * tokens)
    each = shares.unsqueeze(1).expand(samples, tokens, shares.shape[1])
    return Rows(x, each.reshape(x.shape[0], shares.shape[1]))
