"""What operators make of lines and regions: the part of torch that builds attention masks.

A rule takes an operator's arguments, tensors as `Operand`, and returns what is known of the result;
it raises Unknown where that is nothing. An argument that a rule does not name makes it Unknown too.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fx.graph.lines import (
    EVERYWHERE,
    Line,
    Region,
    Size,
    Unknown,
    Value,
    as_line,
    as_region,
    truth,
)

_INTEGERS = (torch.int64, torch.int32)
Rule = Callable[..., Value]


@dataclass(frozen=True)
class Operand:
    """A tensor: what is known of its elements, if anything, and an example of it."""

    known: Value | None
    example: Tensor

    @property
    def value(self) -> Value:
        """What is known; raises Unknown if nothing is."""
        if self.known is None:
            raise Unknown
        return self.known


def fit(value: Value, example: Tensor) -> Value:
    """Return a rule's value as that of a tensor of the example's shape and dtype."""
    if example.dtype == torch.bool:
        return as_region(value).fitted(example.shape)
    line = as_line(value).fitted(example.shape)
    if example.is_floating_point() or example.is_complex():
        raise Unknown
    if example.dtype not in _INTEGERS and number(line) not in (0, 1):
        raise Unknown  # the others have little room
    return line


def _arange(start: Size, end: Size = None, step: int = 1, **_: Any) -> Line:
    return _line(0 if end is None else start) + Line((1,), 0).times(_int(step))


def _constant(value: int) -> Rule:
    return lambda *shape, **_: Line((), value)


def _same(x: Operand, *_: Any, **__: Any) -> Value:
    return x.value


def _add(a: Any, b: Any) -> Line:
    return _line(a) + _line(b)


def _sub(a: Any, b: Any) -> Line:
    return _line(a) - _line(b)


def _mul(a: Any, b: Any) -> Line:
    return _line(b).times(a) if isinstance(a, int) else _line(a).times(_int(b))


def _ge(a: Any, b: Any) -> Region:
    return Region((_line(a) - _line(b),))


def _gt(a: Any, b: Any) -> Region:
    return Region((_line(a) - _line(b) + Line((), -1),))


def _eq(a: Any, b: Any) -> Region:
    return _ge(a, b) & _ge(b, a)


def _ne(a: Any, b: Any) -> Region:
    return as_region(_line(a) - _line(b))


def _and(a: Any, b: Any) -> Region:
    return _region(a) & _region(b)


def _or(a: Any, b: Any) -> Region:
    a, b = _region(a), _region(b)
    if not (a.lines and b.lines):
        return EVERYWHERE
    return a if truth(a) else b


def _not(x: Operand) -> Region:
    return ~_region(x)


def _unsqueeze(x: Operand, dim: int) -> Value:
    place = dim % (x.example.ndim + 1)
    index = (*[slice(None)] * place, None)
    return _getitem(x, index)


def _diff(x: Operand, n: int = 1, dim: int = -1, prepend: Operand | None = None) -> Line:
    """Known where all differences are one number."""
    line = _line(x)
    if n != 1 or dim % x.example.ndim != x.example.ndim - 1:
        raise Unknown
    if prepend is not None:
        if not _is_one(prepend.example.shape[-1]):
            raise Unknown
        first = number(Line((*line.steps[:-1], 0), line.start) - _line(prepend))
        if _is_one(x.example.shape[-1]):
            return Line((), first)
        if first != line.steps[-1]:
            raise Unknown
    return Line((), line.steps[-1])


def _cumsum(x: Operand, dim: int) -> Line:
    each = number(_line(x))
    steps = [0] * x.example.ndim
    steps[dim] = each
    return Line(tuple(steps), each)


def _getitem(x: Any, index: Any) -> Value:
    if not isinstance(x, Operand):
        raise Unknown
    value = x.value
    index = index if isinstance(index, tuple) else (index,)
    if index and all(isinstance(i, Operand) for i in index):
        return _each(value, lambda line: _gathered(line, index))
    places = list(_places(index, x.example.shape))
    return _each(value, lambda line: _sliced(line, places))


def _each(value: Value, change: Callable[[Line], Line]) -> Value:
    """Change the lines that a value is made of."""
    if isinstance(value, Line):
        return change(value)
    return Region(tuple(change(line) for line in value.lines))


def _gathered(line: Line, index: Sequence[Operand]) -> Line:
    """x[i0, i1, …] with a tensor of indices for each dimension."""
    if len(index) != len(line.steps):
        raise Unknown
    result = Line((), line.start)
    for step, one in zip(line.steps, index, strict=True):
        if one.example.dtype not in _INTEGERS:
            raise Unknown
        if step:
            places = _line(one)
            if not places.at_least(0, one.example.shape):
                raise Unknown  # counted from the end
            result += places.times(step)
    return result


def _places(index: tuple[Any, ...], shape: Sequence[Size]) -> Iterator[tuple[int | None, int, int]]:
    """Yield (dimension of x, or None for a new one; first index; step, or 0 to drop it)."""
    taken = sum(i is not None and i is not Ellipsis for i in index)
    rest = [slice(None)] * (len(shape) - taken)
    where = index.index(Ellipsis) if Ellipsis in index else len(index)
    dimension = 0
    for one in (*index[:where], *rest, *index[where + 1 :]):
        if one is None:
            yield None, 0, 1
            continue
        if isinstance(one, slice):
            first = 0 if one.start is None else _int(one.start)
            step = 1 if one.step is None else _int(one.step)
        else:
            first, step = _int(one), 0
        if first < 0:
            raise Unknown
        yield dimension, first, step
        dimension += 1


def _sliced(line: Line, places: Sequence[tuple[int | None, int, int]]) -> Line:
    steps, start = [], line.start
    for dimension, first, step in places:
        own = 0 if dimension is None else line.steps[dimension]
        start += own * first
        if step:
            steps.append(own * step)
    return Line(tuple(steps), start)


def number(line: Line) -> int:
    """Return the one number that all elements are; raises Unknown if it is a symbol."""
    return _int(line.constant)


def _int(x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise Unknown
    return x


def _line(x: Any) -> Line:
    if isinstance(x, Operand):
        return as_line(x.value)
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt):
        raise Unknown
    return Line((), x)


def _region(x: Any) -> Region:
    if isinstance(x, bool):
        return Region.of(x)
    if not isinstance(x, Operand):
        raise Unknown
    return as_region(x.value)


def _is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def _spellings(name: str) -> list[Any]:
    """Return an operator as a method, as a function and as Python's own, as far as there are."""
    functions = getattr(torch, name, None), getattr(operator, name, None)
    return [name, *(function for function in functions if function is not None)]


_NAMED: dict[str, Rule] = {
    "arange": _arange,
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _constant(1)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _constant(0)),
    **dict.fromkeys(("to", "bool", "long", "int", "float", "clone", "contiguous"), _same),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _same),
    "unsqueeze": _unsqueeze,
    "getitem": _getitem,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "ge": _ge,
    "gt": _gt,
    "le": lambda a, b: _ge(b, a),
    "lt": lambda a, b: _gt(b, a),
    "eq": _eq,
    "ne": _ne,
    **dict.fromkeys(("and_", "__and__", "logical_and", "bitwise_and"), _and),
    **dict.fromkeys(("or_", "__or__", "logical_or", "bitwise_or"), _or),
    **dict.fromkeys(("invert", "logical_not", "bitwise_not"), _not),
    "diff": _diff,
    "cumsum": _cumsum,
}
RULES: dict[Any, Rule] = {
    target: rule for name, rule in _NAMED.items() for target in _spellings(name)
}
VIEWS = frozenset(  # what may return its operand, or a view of it
    target
    for name, rule in _NAMED.items()
    if rule in (_same, _unsqueeze, _getitem)
    for target in _spellings(name)
)
