"""Another adapter's tensors in the place of one that is there, whose parameters stay the same.

Where the new one has a smaller rank r than R, A gets rows of zeros and B columns, in every block:
s B A is what it was. Where it has nothing, B is zero, and a magnitude, bias, copy or row is the
base's. So no graph changes. KaSA leaves a part of the weight out, of the adapter's own rank.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_fx.adapters import storage, token_rows
from lora_fx.adapters.peft.keys import is_near, live_tensors, prefixes_of
from lora_fx.adapters.peft.plain import PREFIX, plain
from lora_fx.adapters.sites import magnitudes
from lora_fx.adapters.sites.factors import Arithmetic
from lora_fx.adapters.sites.sampler import LAST
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights import copies
from lora_fx.adapters.weights.changed_weight import rebase
from lora_fx.plan.folding import numberless
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.variants import blocks_of

_PRODUCTS = ("lora", "bdlora", "velora")  # and what is `drawn` alike
_KEPT = ("lora_B.bias", storage.MAGNITUDE, storage.DIRECTION, storage.DIAGONAL)


@dataclass(frozen=True)
class Swap:
    """An adapter's plan and its tensors by their names in a file, to take another's place."""

    plan: AdapterPlan
    tensors: Mapping[str, Tensor]

    def sites(self) -> dict[str, SitePlan]:
        """Return its sites by name, as plain LoRA over the base's own weights."""
        return {site.name: site for site in plain(self.plan).sites}

    def at(self, site: SitePlan) -> dict[str, Tensor]:
        """Return the tensors of a site by PEFT's names."""
        names = (*site.tensors, *_KEPT, *(f"{storage.SAMPLER}.{name}" for name in LAST))
        where = f"{PREFIX}{prefixes_of(self.plan)[site.name]}"
        keys = {name: f"{where}{name}" for name in names}
        return {name: self.tensors[key] for name, key in keys.items() if key in self.tensors}


def obstacles(
    present: AdapterPlan, new: Swap, model: nn.Module, what: str = "the one that is there"
) -> Iterator[str]:
    """Yield why the new adapter does not fit into the one that is there, or `what` else it is."""
    placed, there = dict(storage.sites(model)), {site.name: site for site in present.sites}
    for name, site in new.sites().items():
        if name not in there:
            yield f"it adapts `{numberless(name)}`, which {what} does not"
            continue
        yield from _obstacles_at(there[name], site, placed[name], new.at(site))
    same = {(site.name, site.rank) for site in new.plan.sites if site.variant.name == "kasa"}
    for site in present.sites:
        if site.variant.name == "kasa" and (site.name, site.rank) not in same:
            yield f"it is no `kasa` of rank {site.rank} at `{numberless(site.name)}`"
    for name in _trained(new.plan).keys() - _trained(present):
        yield f"it trains `{numberless(name)}`, which {what} does not"
    rows = {(t.fqn, i) for t in present.tokens for i in t.ids}
    for tokens in new.plan.tokens:
        missing = [str(i) for i in tokens.ids if (tokens.fqn, i) not in rows]
        if missing:
            yield f"it trains rows {', '.join(missing)} of `{tokens.fqn}`, which are not there"


def _trained(plan: AdapterPlan) -> dict[str, None]:
    """Return the names of the modules and biases that an adapter trains, in order."""
    return dict.fromkeys([*(m.fqn for m in plan.modules), *(b.name for b in plan.biases)])


def _obstacles_at(
    there: SitePlan, new: SitePlan, site: Site, values: Mapping[str, Tensor]
) -> Iterator[str]:
    name, room = numberless(there.name), there.rank
    if new.rank > room:
        yield f"its rank at `{name}` is {new.rank}, and there is room for {room}"
    if new.variant.name == there.variant.name == "monteclora" and new.tensors != there.tensors:
        yield f"its `monteclora` at `{name}` has another rank, or draws another number of samples"
    if "alora" in (new.variant.name, there.variant.name) and new.variant != there.variant:
        yield f"one of both waits for its invocation at `{name}`, and the other not for that one"
        return
    if _blocks(new) != _blocks(there) and new.rank <= room:
        yield f"its factors at `{name}` have other blocks"
    known = (*_PRODUCTS, there.variant.name)
    if new.variant.name not in known and not _is_plain(new, site, values):
        yield f"it is `{new.variant.name}` at `{name}`"
    if new.lora_bias and not there.lora_bias:
        yield f"it has a bias on B at `{name}`"
    if new.tie != there.tie:
        yield f"one of both is tied at `{name}`"
    if "loftq" in (new.init.name, there.init.name):
        yield f"`loftq` has put another weight at `{name}`"
    if site.lora_change is not None and storage.MAGNITUDE in new.tensors:
        yield f"it has norms of `{name}`, whose weight the one that is there has changed"


def _is_plain(new: SitePlan, site: Site, values: Mapping[str, Tensor]) -> bool:
    """Whether a magnitude changes nothing: of an adapter that has one at other sites."""
    first, second = list(new.tensors)[:2]
    norms = magnitudes.start(site, (values[first], values[second]), new.scaling)
    return is_near(values[storage.MAGNITUDE], norms) if storage.MAGNITUDE in values else False


def _blocks(site: SitePlan) -> tuple[int, int]:
    return blocks_of(site) if site.variant.name == "bdlora" else (1, 1)


@torch.no_grad()
def swap(present: AdapterPlan, new: Swap, model: nn.Module) -> None:
    """Put the new adapter's values and scalings in place. It fits: there are no `obstacles`."""
    name, placed, sites = present.name, dict(storage.sites(model)), new.sites()
    for planned in present.sites:
        site, own = placed[planned.name], sites.get(planned.name)
        if planned.takes_from_base and site.lora_change is not None:
            start = site.lora_change.factors
            rebase(site, torch.zeros_like(start.A.weight), torch.zeros_like(start.B.weight))
        _swap_site(model, site, planned, own, {} if own is None else new.at(own))
    of_sites = {
        id(tensor)
        for site in placed.values()
        if name in site.lora_branches
        for tensor in storage.tensors(site, name).values()
    }
    rows = {tokens.fqn: tokens.ids for tokens in new.plan.tokens}
    for fqn, module in storage.base_modules(model, itself=True).items():
        for held in token_rows.rows_of(module, name):
            if isinstance(module, nn.Embedding):
                _swap_rows(module, held, rows.get(fqn, ()), _tensor(new, fqn, "token_adapter"))
                of_sites.add(id(held.weight))
    trained = {_outside(key): tensor for key, tensor in new.tensors.items()}
    for key, tensor in live_tensors(model, name).items():
        if id(tensor) not in of_sites and not tensor._is_view():
            place = _outside(f"{PREFIX}{key}")
            fqn, _, leaf = place.removeprefix(PREFIX).rpartition(".")
            base = copies.base_tensor(model.get_submodule(fqn), leaf)
            assert base is not None
            tensor.copy_(trained.get(place, base))


def _outside(key: str) -> str:
    """Return the name of a tensor of the base whether or not an adapter adapts its module."""
    return key.replace(".base_layer", "")


def _swap_site(
    model: nn.Module,
    site: Site,
    there: SitePlan,
    new: SitePlan | None,
    values: Mapping[str, Tensor],
) -> None:
    held, name = storage.tensors(site, there.adapter), there.adapter
    first, second = list(there.tensors)[:2]
    old = site.lora_arithmetic[name]
    if new is None:
        held[second].zero_()
    else:
        A, B = _with_rank(values[first], values[second], new.rank, there)
        held[first].copy_(A)
        held[second].copy_(B)
        storage.compute_as(model, site, name, _scaled(old, new, there.rank))
    if "lora_B.bias" in held:
        held["lora_B.bias"].copy_(values.get("lora_B.bias", torch.zeros(())))
    if storage.DIRECTION in held and storage.DIRECTION in values:
        held[storage.DIRECTION].copy_(values[storage.DIRECTION])
    if storage.DIAGONAL in held:
        held[storage.DIAGONAL].copy_(values[storage.DIAGONAL])
    for key in (name for name in held if name.startswith(storage.SAMPLER) and name in values):
        held[key].copy_(values[key])
    if storage.MAGNITUDE in held:
        if storage.MAGNITUDE in values:
            held[storage.MAGNITUDE].copy_(values[storage.MAGNITUDE])
        else:
            magnitudes.begin(site, name)


def _with_rank(A: Tensor, B: Tensor, rank: int, there: SitePlan) -> tuple[Tensor, Tensor]:
    """Return factors of the rank that is there, with the same product, of the same blocks.

    Of a convolution, in the same groups; of a stack, of the same experts.
    """
    in_A, in_B = places(rank, there)
    shapes = list(there.tensors.values())
    wide_A = A.new_zeros(shapes[0][0], *A.shape[1:]).index_copy(0, in_A, A)
    wide_B = B.new_zeros(B.shape[0], shapes[1][1], *B.shape[2:])
    return wide_A, wide_B.index_copy(1, in_B, B)


def places(rank: int, there: SitePlan) -> tuple[Tensor, Tensor]:
    """Return where the rows of A, and the columns of B, of a smaller rank are at a site."""
    blocks, groups, experts = _blocks(there), there.layer.groups, there.layer.experts
    room, rank = there.rank * experts, rank * experts
    count, of_B = max(*blocks, groups, experts), max(blocks[1], groups)
    rows = torch.arange(rank)
    in_A = rows // (rank // count) * (room // count) + rows % (rank // count)
    return in_A, in_A if of_B == experts == 1 else rows[: rank // of_B]


def _scaled(old: Arithmetic, new: SitePlan, rank: int) -> Arithmetic:
    """Return how the branch computes with the new scaling, and the α that it is at this rank."""
    alpha = new.scaling * (math.sqrt(rank) if new.rslora else rank)
    return replace(old, alpha=alpha, scaling=new.scaling, rslora=new.rslora)


def _tensor(new: Swap, fqn: str, part: str) -> Tensor | None:
    start = f"{PREFIX}{fqn}."
    found = (t for key, t in new.tensors.items() if key.startswith(start) and f"{part}." in key)
    return next(found, None)


def _swap_rows(
    module: nn.Embedding, held: token_rows.Rows, ids: Sequence[int], values: Tensor | None
) -> None:
    base = copies.base_tensor(module, "weight")
    assert base is not None
    held.weight.copy_(base[list(held.ids)])
    if values is not None:
        held.weight[[held.ids.index(token) for token in ids]] = values.to(held.weight)
