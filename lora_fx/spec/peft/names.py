"""Names and patterns by which PEFT finds exactly these modules among those of a model."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def targets(chosen: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """Return leaf names if they select exactly the chosen, else full names, else a pattern."""
    for names in ({fqn.rpartition(".")[2] for fqn in chosen}, set(chosen)):
        selected = {fqn for fqn in modules if any(is_or_ends_with(fqn, name) for name in names)}
        if selected == set(chosen):
            return sorted(names)
    return "|".join(re.escape(fqn) for fqn in sorted(chosen))


def suffixes(chosen: Sequence[str], modules: Iterable[str]) -> list[str] | None:
    """Return texts that exactly the chosen end with, as `modules_to_save` is meant; None if none.

    PEFT looks at the bare end of a name: `head` also means `lm_head`.
    """
    modules = list(modules)
    for names in ({fqn.rpartition(".")[2] for fqn in chosen}, set(chosen)):
        selected = {fqn for fqn in modules if any(fqn.endswith(name) for name in names)}
        if selected == set(chosen):
            return sorted(names)
    return None


def pattern_values(values: Mapping[str, Any], otherwise: Any) -> dict[str, Any]:
    """Return `rank_pattern` or `alpha_pattern`: what differs, each for its module only."""
    return {only(fqn, values): value for fqn, value in values.items() if value != otherwise}


def only(fqn: str, others: Iterable[str]) -> str:
    """Return a pattern for this module; a bare name is also that of every name that ends in it."""
    ends_alike = any(other != fqn and is_or_ends_with(other, fqn) for other in others)
    return f"^{fqn}" if ends_alike else fqn


def is_or_ends_with(fqn: str, name: str) -> bool:
    """Whether a dotted name is another, or ends with a dot and it."""
    return fqn == name or fqn.endswith(f".{name}")


def commonest(values: Iterable[Any]) -> Any:
    """Return the value that is there most often; of several the first."""
    return Counter(values).most_common(1)[0][0]


def alpha_of(alpha: float, scaling: float, rank: int, rslora: bool) -> float:
    """Return the alpha that gives a scaling as α/r, or with `rslora` as α/√r."""
    divisor = math.sqrt(rank) if rslora else rank
    exact = alpha if alpha / divisor == scaling else scaling * divisor
    return int(exact) if float(exact).is_integer() else exact
