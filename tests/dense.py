"""The reference of numeric tests: dense float64, one product at a time."""

from torch import Tensor


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, in float64."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).item()


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: list[tuple[float, Tensor, Tensor]]
) -> Tensor:
    """x (W + Σ s B A)ᵀ + b, the weight materialised."""
    dense = weight.double()
    for scaling, A, B in branches:
        dense = dense + scaling * (B.double() @ A.double())
    y = x.double() @ dense.T
    return y if bias is None else y + bias.double()
