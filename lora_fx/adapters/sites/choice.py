"""What a site adds to its base for one choice of adapters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_fx.adapters.sites.factors import Arithmetic, Factors
from lora_fx.adapters.sites.slot_stack import SlotStack
from lora_fx.graph.structure import Branch, keys


@dataclass(frozen=True)
class Added:
    """One branch. In a mixed batch, `column` is that of the adapter's shares.

    `invoked` is that of the tokens on which it acts, of a branch that acts from its invocation on.
    `rest`: it takes part by what that share is less than 1, as what an adapter took out of the
    weight does.
    """

    factors: Factors
    arithmetic: Arithmetic
    column: int | None = None
    rest: bool = False
    invoked: int | None = None

    @property
    def branch(self) -> Branch:
        """How it is computed in training."""
        return Branch(
            self.factors.rank,
            self.arithmetic.dropout,
            self.arithmetic.compute,
            self.factors.has_bias,
            self.factors.magnitude is not None,
            self.arithmetic.blocks,
            *self.arithmetic.kept,
            self.factors.diagonal is not None,
            *self.arithmetic.drawn,
            self.column,
            self.rest,
            self.invoked,
        )


@dataclass(frozen=True)
class Choice:
    """All branches and, in training and outside it, their structure.

    `is_routed`: each token has its own shares in them, by `Experts.prototypes`. The last
    branches are computed as the `stack` that they lie in, if there is one; the `single` ones are
    those before it. `has_magnitude` says that one of all is DoRA's, `waits` that one acts from its
    invocation on. A graph's guards so look at as many branches as it computes one by one.
    """

    added: tuple[Added, ...]
    single: tuple[Added, ...]
    training: str
    evaluation: str
    has_magnitude: bool
    waits: bool
    is_routed: bool = False
    stack: SlotStack | None = None


def choose(
    kind: str,
    added: Sequence[Added],
    *layer: Any,
    arrow: tuple[int, float] | None = None,
    stack: SlotStack | None = None,
) -> Choice:
    """Return the choice of these branches at a module; the `layer` is told as in `Structure`.

    A `stack` is of the last branches, unless they differ in how they are computed.
    """
    training = tuple(one.branch for one in added)
    if stack is not None:
        count = len(stack.slots)
        alike = training[-count].evaluated()
        if training[-count:] == tuple(_followed(alike, count)):
            training = *training[:-count], replace(alike, many=count)
        else:
            stack = None
    all = tuple(added)
    return Choice(
        all,
        all if stack is None else all[: -len(stack.slots)],
        *keys(kind, training, *layer, arrow=arrow),
        has_magnitude=any(one.factors.magnitude is not None for one in all),
        waits=any(one.invoked is not None for one in all),
        is_routed=arrow is not None,
        stack=stack,
    )


def _followed(branch: Branch, count: int) -> Iterator[Branch]:
    for i in range(count):
        yield replace(branch, column=(branch.column or 0) + i)
