"""Say once what holds of many modules."""

from collections.abc import Sequence
from dataclasses import replace

from lora_fx.diagnostics import Diagnostic


def once_each(faults: Sequence[Diagnostic]) -> list[Diagnostic]:
    """Return of faults that say the same the first, with the number of the others."""
    alike: dict[tuple, list[Diagnostic]] = {}
    for fault in faults:
        alike.setdefault((fault.code, fault.span, fault.message), []).append(fault)
    return [_with_others(first, len(others)) for first, *others in alike.values()]


def _with_others(first: Diagnostic, others: int) -> Diagnostic:
    if not others:
        return first
    return replace(
        first, notes=(*first.notes, f"likewise at {others} more module{'s' * (others > 1)}")
    )
