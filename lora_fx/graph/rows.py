"""Which rows of a function's result belong to which rows of its argument.

Rows are dimension 0. What is told of each, in a tensor `of` whose dimension 0 is as long, is told
of the result's rows where it is certain whose they are: after what computes row by row, and what
picks, repeats or unfolds rows. Of any other function nothing is known, and so nothing is told.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Rule = Callable[[Tensor, Tensor, Sequence[Any], Mapping[str, Any], Tensor], Tensor | None]


def rows_after(
    name: str, place: int, of: Tensor, args: Sequence[Any], named: Mapping[str, Any], result: Any
) -> Tensor | None:
    """Return what is told of the rows of `result`, None if it is not known whose they are.

    That is of the function of this name, whose argument at `place` is the tensor whose rows `of`
    (rows, …) tells of.
    """
    x = args[place]
    if not isinstance(result, Tensor) or not result.ndim or not x.ndim:
        return None
    if name in _PRODUCTS:
        return of if _is_product(name, place, x, result) else None
    rule = _RULES.get(name) if place == 0 or name in _ELEMENTS else None
    return None if rule is None else rule(x, of, args[1:], named, result)


def _is_product(name: str, place: int, x: Tensor, result: Tensor) -> bool:
    """Whether rows are multiplied by matrices, each by itself: then there are as many as before."""
    alike = x.ndim > 1 and result.ndim == x.ndim and result.shape[0] == x.shape[0]
    if name in ("matmul", "__matmul__", "bmm"):
        return alike and (place == 0 or x.ndim > 2)
    return alike and place == (1 if name == "addmm" else 0)


def _each(x: Tensor, of: Tensor, rest: Any, named: Any, result: Tensor) -> Tensor | None:
    """Element by element: there are as many rows as before."""
    return of if result.ndim == x.ndim and result.shape[0] == x.shape[0] else None


def _in_rows(x: Tensor, of: Tensor, rest: Any, named: Any, result: Tensor) -> Tensor | None:
    """Work along dimensions that are named; they may be gone afterwards."""
    dims = named.get("dim", named.get("axis", rest[0] if rest else None))
    dims = dims if isinstance(dims, list | tuple) else (dims,)
    whole = all(isinstance(dim, int) and dim % x.ndim for dim in dims)
    return of if whole and dims and result.shape[0] == x.shape[0] else None


def _along_last(x: Tensor, of: Tensor, rest: Any, named: Any, result: Tensor) -> Tensor | None:
    """Norms over the last dimensions, which are given by their sizes."""
    shape = named.get("normalized_shape", rest[0] if rest else ())
    return of if len(shape) < x.ndim else None


def _unsqueezed(x: Tensor, of: Tensor, rest: Any, named: Any, result: Tensor) -> Tensor | None:
    dim = named.get("dim", rest[0] if rest else 0)
    return of if dim % (x.ndim + 1) else None


def _unfolded(x: Tensor, of: Tensor, rest: Any, named: Any, result: Tensor) -> Tensor | None:
    """View in the order of memory: rows stay, or each becomes as many as dimension 1 has."""
    if result.shape[0] == x.shape[0]:
        return of
    if x.ndim > 1 and result.shape[0] == x.shape[0] * x.shape[1]:
        return of.repeat_interleave(x.shape[1], 0)
    return None


def _repeated(x: Tensor, of: Tensor, rest: Any, named: Any, result: Tensor) -> Tensor | None:
    times = named.get("repeats", rest[0] if rest else None)
    dim = named.get("dim", rest[1] if len(rest) > 1 else None)
    return of.repeat_interleave(times, 0) if dim == 0 and isinstance(times, int) else None


def _picked(x: Tensor, of: Tensor, rest: Any, named: Any, result: Tensor) -> Tensor | None:
    index = rest[0]
    if isinstance(index, Tensor):
        known = index.ndim == 1 and index.device == of.device
        return of[index] if known else None
    if isinstance(index, slice):
        return of[index]
    if not isinstance(index, tuple) or not index:
        return None
    first, *others = index
    if any(isinstance(one, Tensor | list) or one is Ellipsis for one in others):
        return None
    if first is Ellipsis:
        spared = sum(one is not None for one in others)
        return of if spared < x.ndim else None
    return of if isinstance(first, slice) and first == slice(None) else None


def _split(x: Tensor, of: Tensor, rest: Any, named: Any, result: Tensor) -> Tensor | None:
    """One of the pieces."""
    dim = named.get("dim", rest[1] if len(rest) > 1 else 0)
    return of if dim % x.ndim else None


_ELEMENTS = (  # those of several tensors have the rows of any of them
    *("add", "sub", "mul", "div", "true_divide", "pow", "neg", "abs", "exp", "log", "sqrt"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
    *("__rtruediv__", "__pow__", "__neg__", "__iadd__", "__isub__", "__imul__", "__itruediv__"),
    *("rsub", "square", "rsqrt", "reciprocal", "sigmoid", "tanh", "erf", "relu", "relu6", "silu"),
    *("gelu", "elu", "celu", "selu", "leaky_relu", "softplus", "mish", "hardswish", "hardtanh"),
    *("hardsigmoid", "logsigmoid", "clamp", "clip", "minimum", "maximum", "dropout"),
    *("masked_fill", "to", "type", "type_as", "float", "half", "bfloat16", "double", "cpu", "cuda"),
    *("clone", "detach", "contiguous", "nan_to_num", "lerp", "where"),
)
_IN_PLACE = ("add", "sub", "mul", "div", "clamp", "relu", "silu", "masked_fill", "neg", "pow")
_PRODUCTS = (
    *("linear", "matmul", "__matmul__", "mm", "bmm", "addmm"),
    *("grouped_mm", "_grouped_mm", "grouped_mm_fallback", "grouped_mm_fallback.default"),
)
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys((*_ELEMENTS, *(f"{name}_" for name in _IN_PLACE)), _each),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "squeeze"), _in_rows),
    **dict.fromkeys(("rms_norm", "layer_norm"), _along_last),
    **dict.fromkeys(("view", "reshape", "flatten", "view_as", "reshape_as"), _unfolded),
    **dict.fromkeys(("chunk", "split", "tensor_split"), _split),
    "unsqueeze": _unsqueezed,
    "repeat_interleave": _repeated,
    "__getitem__": _picked,
}
