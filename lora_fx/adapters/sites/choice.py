"""What a site adds to its base for one choice of adapters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from lora_fx.adapters.sites.factors import Arithmetic, Factors, Held
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

    `is_routed`: each token has its own shares in them, by `Experts.prototypes`. The last branches
    are computed as the `stack` that they lie in, if there is one, those before it one by one:
    `held` says where the tensors of these are. `has_magnitude` says that one of all is DoRA's,
    `waits` that one acts from its invocation on.

    `form` is equal for choices that differ in nothing but tensors and scalings, and empty without
    branches. A graph's guards look at it, and at the tensors of those held and of the stack.
    """

    added: tuple[Added, ...]
    training: str
    evaluation: str
    has_magnitude: bool
    waits: bool
    held: tuple[Held, ...]
    form: str
    is_routed: bool = False
    stack: SlotStack | None = None

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """What holds the tensors, by their places in `held`, and the stack."""
        found = {str(i): one.module for i, one in enumerate(self.held)}
        return found if self.stack is None else {**found, "stack": self.stack}


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
    single = all if stack is None else all[: -len(stack.slots)]
    both = keys(kind, training, *layer, arrow=arrow)
    waits, is_routed = any(one.invoked is not None for one in all), arrow is not None
    forms = [both[0], both[1], f"{waits} {is_routed} {len(all)}", *map(_form, single)]
    return Choice(
        all,
        *both,
        has_magnitude=any(one.factors.magnitude is not None for one in all),
        waits=waits,
        held=tuple(held for one in single for held in one.factors.held),
        form=" ".join(forms) if all else "",
        is_routed=is_routed,
        stack=stack,
    )


def _form(one: Added) -> str:
    """Return all that a branch is beside its tensors and its scaling."""
    own = one.arithmetic.compression, one.column, one.rest, one.invoked
    return f"{one.factors.form} {own}"


def _followed(branch: Branch, count: int) -> Iterator[Branch]:
    for i in range(count):
        yield replace(branch, column=(branch.column or 0) + i)
