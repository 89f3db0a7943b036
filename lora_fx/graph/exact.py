"""Matrix products in the dtype itself, whatever is allowed for speed elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 in float32: without TF32, bfloat16 or autocast; afterwards all is as it was.

    Also a decorator.
    """
    backends: list[Any] = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
    before = [backend.fp32_precision for backend in backends]
    if before == ["ieee", "ieee"] and not any(map(torch.is_autocast_enabled, ("cuda", "cpu"))):
        yield
        return
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
