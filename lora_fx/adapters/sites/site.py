"""A marked module: an adaptable call that announces itself to the tracer as `lora_fx::site`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.routing import Routing
from lora_fx.adapters.sites.choice import Added, Choice, choose
from lora_fx.adapters.sites.directions import follow
from lora_fx.adapters.sites.experts import Experts
from lora_fx.adapters.sites.factors import Arithmetic, Change, Factors
from lora_fx.adapters.sites.layer import is_convolution, output_scale, window_of
from lora_fx.adapters.sites.scalings import Placed, place
from lora_fx.adapters.sites.slot_stack import SlotStack
from lora_fx.graph import ops
from lora_fx.graph.room import owns_room, with_room
from lora_fx.plan.packed import packed_tensors, packing_of
from lora_fx.spec.spec import ArrowSpec

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class Site(_Base):
    """Mixin for a base module that carries adapters (see `dynamic_class.specialise`).

        y = base(x) + sum over active adapters of scaling * (B A drop(x) + b)

    or, with a magnitude m, of (m / ‖W + scaling * B A‖ - 1) * W drop(x) and what is above times the
    same quotient (Liu et al. 2024, arXiv 2402.09353, eq. 5: the norms are of rows, and constants),
    for a linear layer, in either layout of its weight, an embedding, whose x is one-hot, or a
    convolution, where A is one and B stands at each place of its output. With a diagonal d (KaSA)
    B diag(d) stands for B. Where an adapter's factors lie, `storage` knows. With no active adapter
    the module computes what its base class computes, bit for bit, or to rounding where an adapter
    has changed the weight.

    In a mixed batch each sample, along dimension 0, has its own shares of the adapters, which
    multiply what they add. Of an input (S, T, in), an adapter that acts from its invocation on
    (aLoRA, arXiv 2504.12397) adds nothing to the tokens before it. With `lora_arrow` each token has
    its own shares of the active adapters, `graph/arrow.py`.

    A graph reads the `form` of a choice, and tensors out of the `modules` that have them. What it
    reads of a choice besides follows from the form: `runtime/units/kept_guards.py`.
    """

    lora_kind: str
    lora_scalings: Tensor
    lora_arithmetic: dict[str, Arithmetic]
    lora_active: tuple[str, ...]
    lora_branches: dict[str, Factors]
    lora_choice: Choice
    lora_choice_form: str
    lora_choice_modules: Mapping[str, nn.Module]
    lora_mixed: Choice | None = None
    lora_mixed_form: str
    lora_mixed_modules: Mapping[str, nn.Module]
    lora_mixed_scalings: Tensor
    lora_placed: Mapping[str, Placed] = {}
    lora_routing: Routing | None = None
    lora_arrow: ArrowSpec | None = None
    lora_experts: Experts
    weight: Tensor
    lora_room: bool = False
    lora_packed: bool = False
    lora_change: "Change | None" = None
    lora_in_weights: tuple[str, ...] = ()
    lora_slots: SlotStack
    lora_multiplier: float = 1.0

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base module, then announce the active branches."""
        output = super().forward(input, *args, **kwargs)
        return self._announced(output, input, None)

    def _announced(self, output: Tensor, input: Tensor, rows: slice | None) -> Tensor:
        """Return a base output with the branches of this call, announced to the tracer.

        The output may be that of some of the weight's rows.
        """
        shares = None if self.lora_routing is None else self.lora_routing.shares
        learns = self.training and torch.is_grad_enabled()
        if shares is not None and self.lora_mixed is not None:
            if not isinstance(shares, Tensor) or not self.lora_mixed_form:
                return output
            if learns:
                follow(self.lora_mixed.added, input, shares.to(input.device))
            which = self.lora_mixed, self.lora_mixed_modules, self.lora_mixed_scalings
            return self._add(output, input, *which, shares, rows)
        if not self.lora_choice_form:
            return output
        if learns:
            follow(self.lora_choice.added, input)
        which = self.lora_choice, self.lora_choice_modules, self.lora_scalings
        return self._add(output, input, *which, None, rows)

    def _add(
        self,
        output: Tensor,
        input: Tensor,
        choice: Choice,
        modules: Mapping[str, nn.Module],
        scalings: Tensor,
        shares: Tensor | None,
        rows: slice | None,
    ) -> Tensor:
        """Announce what is added to the base's output."""
        params = [
            one.tensor(modules[str(i)], rows)
            for i, one in enumerate(choice.held)
            if self.training or not one.learning
        ]
        if "stack" in modules:
            params += [modules["stack"].A, modules["stack"].B]  # type: ignore[list-item]
        key = choice.training if self.training else choice.evaluation
        base = self._base(rows) if choice.has_magnitude else []
        shared = () if shares is None else (shares.to(input.device),)
        if choice.waits:
            invoked = None if self.lora_routing is None else self.lora_routing.invoked
            there = None if invoked is None else invoked.to(input.device)
            shared = *(shared or (None,)), there
        if choice.is_routed:
            shared = *(*shared, None, None)[:2], self.lora_experts.prototypes
        return ops.site(output, input, params, scalings, key, base, *shared)

    @property
    def takes_part(self) -> bool:
        """Whether any adapter is computed here in the running call."""
        mixed = self.lora_adds_mixed
        return bool(self.lora_active) if mixed is None else mixed

    @property
    def adds(self) -> bool:
        """Whether anything is added to what the base module computes in the running call."""
        mixed = self.lora_adds_mixed
        return bool(self.lora_choice.added) if mixed is None else mixed

    @property
    def lora_adds_mixed(self) -> bool | None:
        """Whether samples of the running call can have branches here, None if it is not routed."""
        routing, choice = self.lora_routing, self.lora_mixed
        if routing is None or routing.shares is None or choice is None:
            return None
        return routing.mixes and bool(choice.added)

    def _base(self, rows: slice | None = None) -> list[Tensor]:
        """Return the weight as (out, in), or (out, in, k…), and the bias if there is one.

        Or these rows of both. A weight in 4 or 8 bits as the tensors that it is packed in.
        """
        bias = self.lora_base_bias
        more = [] if bias is None else [bias]
        if self.lora_packed:
            return [*packed_tensors(self), *more]
        both = [self.weight.t() if self.lora_turned else self.weight, *more]
        return both if rows is None else [tensor[rows] for tensor in both]

    @property
    def lora_base_bias(self) -> Tensor | None:
        """The bias that the module adds to what it computes of the weight."""
        return getattr(self, "bias", None)

    def lora_rank(self, adapter: str) -> int:
        """Return the inner dimension of an adapter's branch."""
        return self.lora_branches[adapter].rank

    @property
    def lora_place(self) -> tuple[nn.Module, str]:
        """The module that the weight belongs to, and its name there."""
        return self, "weight"  # type: ignore[return-value]

    def activate(self, adapters: tuple[str, ...], in_weights: tuple[str, ...] = ()) -> None:
        """Let these adapters, of those present here, take part in the forward, in this order.

        Those that are merged `in_weights` are in the weight that is here. The place of one that
        acts from its invocation on is its column in `Routing.invoked`.
        """
        self.lora_in_weights = in_weights
        self.lora_active = tuple(name for name in adapters if name in self.lora_arithmetic)
        if self.lora_arrow is not None and self.lora_active:
            self.lora_choice = self._routed_by(self.lora_arrow)
            self._place_choices()
            return
        branches = self.branches_with(adapters)
        waiting = {
            self.lora_branches[name]: column
            for column, name in enumerate(adapters)
            if name in self.lora_arithmetic and self.lora_arithmetic[name].invoked
        }
        added = [Added(*branch, invoked=waiting.get(branch[0])) for branch in branches]
        self.lora_choice = self._choose(added)
        self._place_choices()

    def route(self, adapters: tuple[str, ...], terms: int) -> None:
        """Say which adapter each column of the shares of a mixed batch is of.

        No sample has more than `terms` of them.
        """
        c, change = self.lora_multiplier, self.lora_change
        added = [
            Added(
                self.lora_branches[name],
                arithmetic.times(c),
                column,
                invoked=column if arithmetic.invoked else None,
            )
            for column, name in enumerate(adapters)
            if (arithmetic := self.lora_arithmetic.get(name)) is not None
        ]
        if change is not None and change.adapter not in adapters:
            added.insert(0, Added(change.factors, change.arithmetic))
        elif change is not None:
            column = adapters.index(change.adapter)
            if c != 1:
                added.insert(0, Added(change.factors, change.arithmetic.times(1 - c), column))
            added.insert(0, Added(change.factors, change.arithmetic, column, rest=True))
        self.lora_mixed = self._choose(added, terms, self._settled_slots())
        self._place_choices()

    def _routed_by(self, arrow: ArrowSpec) -> Choice:
        """Return the active adapters as those among which each token is routed."""
        names = self.lora_active
        branches = self.branches_with(names)
        general = [self.lora_branches[name] for name in arrow.general]
        of = names, [factors for factors, _ in branches], general
        if "lora_experts" not in self._modules or not self.lora_experts.is_of(*of):
            self.lora_experts = Experts(*of)
        own = zip(self.lora_experts.branches, branches, strict=True)
        added = [Added(factors, arithmetic) for factors, (_, arithmetic) in own]
        among = min(arrow.top, len(added)), arrow.temperature
        return choose(self.lora_kind, added, *self._layer(added), arrow=among)

    def _choose(
        self, added: Sequence[Added], terms: int = 0, stack: SlotStack | None = None
    ) -> Choice:
        return choose(self.lora_kind, added, *self._layer(added), terms, stack=stack)

    def _layer(self, added: Sequence[Added]) -> tuple[Any, ...]:
        """Return what `Structure` is told of the layer, for these branches."""
        padding = getattr(self, "padding_idx", None)
        packing = packing_of(self)
        self.lora_packed = packing is not None
        packing = packing if any(one.factors.magnitude for one in added) else None
        return padding, output_scale(self), window_of(self), packing

    @property
    def lora_turned(self) -> bool:
        """Whether the weight is (in, out): of `Conv1D`, and of an embedding."""
        return not isinstance(self, nn.Linear) and not is_convolution(self)

    def branches_with(self, adapters: tuple[str, ...]) -> list[tuple[Factors, Arithmetic]]:
        """Return all that adds to the weight that is here while these adapters are active.

        What an adapter took out of the weight comes first, where that adapter is not active, or as
        much of it as a multiplier leaves: the weight and these branches together are what the
        module computes.
        """
        c, change = self.lora_multiplier, self.lora_change
        present = [name for name in adapters if name in self.lora_arithmetic]
        found = [(self.lora_branches[n], self.lora_arithmetic[n].times(c)) for n in present]
        if change is not None and change.adapter not in self.lora_in_weights:
            share = 1 - c if change.adapter in present else 1.0
            if share:
                found.insert(0, (change.factors, change.arithmetic.times(share)))
        return found

    def _place_choices(self) -> None:
        """Put beside the choices what a graph reads of them: forms, modules and scalings.

        Scalings are float32 on the parameters' device, whatever the module is cast to. An embedding
        that scales its output scales the branches with it.
        """
        choices = {"lora_scalings": self.lora_choice, "lora_mixed_scalings": self.lora_mixed}
        factor = output_scale(self)
        for name, choice in (("lora_choice", self.lora_choice), ("lora_mixed", self.lora_mixed)):
            if choice is not None:
                self.__dict__[f"{name}_form"] = choice.form
                self.__dict__[f"{name}_modules"] = choice.modules
        self.lora_placed = {
            name: place(self, name, choice, factor, self.lora_placed.get(name))
            for name, choice in choices.items()
            if choice is not None
        }

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.lora_placed = {}
        self._place_choices()
        self.keep_room()
        self._settled_slots()
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.keep_room()
        self._settled_slots()

    def _settled_slots(self) -> SlotStack | None:
        stacked = "lora_slots" in self._modules and self.lora_slots.settle()
        return self.lora_slots if stacked else None

    def make_room(self) -> None:
        """Move the base weight (out, in) to where it has room, and again whenever it is moved."""
        wide = with_room(self.weight.detach())
        self._parameters["weight"] = nn.Parameter(wide, self.weight.requires_grad)
        self.lora_room = True

    def keep_room(self) -> None:
        """Make room beside the weight in force anew where it was packed."""
        if self.lora_room and not owns_room(self.weight):
            self.weight.data = with_room(self.weight.detach())
