"""The names of an adapter's tensors in a PEFT folder."""

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_fx.adapters import storage, token_rows
from lora_fx.adapters.bind import sharing_weight
from lora_fx.adapters.peft.inside_attention import (
    adapted_attentions,
    in_file,
    planned_attentions,
)
from lora_fx.adapters.peft.kept_weights import name_of
from lora_fx.adapters.peft.plain import PREFIX, joined, plain, split
from lora_fx.adapters.sites import magnitudes
from lora_fx.adapters.sites.sampler import last_draw
from lora_fx.adapters.weights import copies
from lora_fx.adapters.weights.changed_weight import rebase
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph.velora import width_of
from lora_fx.plan.modules import input_embedding
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.variants import compression_of, drawn_of, magnitude_shape

_ROWS = "token_adapter.trainable_tokens_delta"


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's live tensors, in module order, by their names in a file.

    What an adapter has of a module of the base that it also adapts lies below `base_layer`. A layer
    tied to an adapted embedding has tensors of its own in the file, transposed. An adapter that has
    magnitudes at some sites has them at all in the file: m = ‖W + s B A‖ changes nothing. Where it
    changed the base's weight, it stands there as `plain` says.
    """
    found, prefixes = live_tensors(model, adapter), _prefixes(model, adapter)
    for name, site in _taken_from(model, adapter):
        found |= {f"{prefixes[name]}{n}": tensor for n, tensor in joined(site, adapter).items()}
    found |= _magnitudes_of_plain_sites(model, adapter)
    return {f"{PREFIX}{name}": tensor.detach().contiguous() for name, tensor in found.items()}


def _changed_sites(model: nn.Module, adapter: str) -> list[tuple[str, storage.Site]]:
    placed = storage.sites(model)
    return [(f, s) for f, s in placed if s.lora_change and s.lora_change.adapter == adapter]


def _taken_from(model: nn.Module, adapter: str) -> list[tuple[str, storage.Site]]:
    placed = _started_sites(model, adapter)
    return [(f, s) for f, s in placed if s.lora_change and not s.lora_change.replaced]


def _started_sites(model: nn.Module, adapter: str) -> list[tuple[str, storage.Site]]:
    placed = _changed_sites(model, adapter)
    return [(f, s) for f, s in placed if s.lora_change and not s.lora_change.removed]


def live_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's parameters and buffers by their names in a file, without the prefix."""
    found: dict[str, Tensor] = {}
    attentions = adapted_attentions(model, adapter)
    for fqn, module in storage.base_modules(model, itself=True).items():
        here = _sites_of(module, adapter)
        for depth, site in enumerate(reversed(here.values())):
            prefix = inner_prefix(in_file(fqn, attentions), depth)
            found |= {f"{prefix}{name}": t for name, t in _of_site(site, adapter)}
        inner = inner_prefix(in_file(fqn, attentions), len(here))
        if copies.has(module, adapter):
            own = copies.tensors(module, adapter)
            found |= {f"{inner}{name}": tensor for name, tensor in own.items()}
        if isinstance(module, token_rows.TokenRows) and isinstance(module, nn.Embedding):
            for rows in token_rows.rows_of(module, adapter):
                found[f"{inner}{_ROWS}"] = rows.weight
    return found


def _sites_of(module: nn.Module, adapter: str) -> dict[str, storage.Site]:
    found = storage.sites_at(module).items()
    return {name: site for name, site in found if adapter in site.lora_arithmetic}


def _prefixes(model: nn.Module, adapter: str) -> dict[str, str]:
    """Return what the names of the tensors of each site begin with in a file, by its name."""
    found, attentions = {}, adapted_attentions(model, adapter)
    for fqn, module in storage.base_modules(model, itself=True).items():
        for depth, name in enumerate(reversed(_sites_of(module, adapter))):
            prefix = inner_prefix(in_file(fqn, attentions), depth)
            found[f"{fqn}.{name}".strip(".")] = prefix
    return found


def expected_tensors(plan: AdapterPlan, model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor that a file of this adapter holds, empty and on meta, by its name."""
    prefixes, attentions = prefixes_of(plan), planned_attentions(plan)
    adapted = Counter(site.fqn for site in plan.sites)
    dora = any(storage.MAGNITUDE in site.tensors for site in plan.sites)
    found: dict[str, Tensor] = {}
    for site in plain(plan).sites:
        shapes = _shapes_at(site, dora).items()
        prefix = prefixes[site.name]
        found |= {f"{prefix}{name}": _empty(*shape) for name, shape in shapes}
        if site.tie:
            for fqn in _tied(model, site.fqn):
                found[f"{fqn}.lora_A.weight"] = _empty(site.rank, site.out_features)
                found[f"{fqn}.lora_B.weight"] = _empty(site.in_features, site.rank)
    for trained in plan.modules:
        base = storage.base_modules(model.get_submodule(trained.fqn), itself=True)
        for inside, module in base.items():
            fqn = f"{trained.fqn}.{inside}".rstrip(".")
            for name in copies.own_names(module):
                tensor = copies.base_tensor(module, name)
                assert tensor is not None
                found[f"{inner_prefix(fqn, adapted[fqn])}{name}"] = tensor.detach().to("meta")
    for bias in plan.biases:
        fqn, _, name = bias.name.rpartition(".")
        inner = inner_prefix(in_file(fqn, attentions), adapted[fqn])
        found[f"{inner}{name}"] = _empty(bias.parameters)
    for rows in plan.tokens:
        found[f"{inner_prefix(rows.fqn, adapted[rows.fqn])}{_ROWS}"] = _empty(
            len(rows.ids), rows.width
        )
    return {f"{PREFIX}{name}": tensor for name, tensor in found.items()}


def _shapes_at(site: SitePlan, dora: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a file has of a site; in an adapter with `dora`, of all sites."""
    shapes = dict(site.tensors)
    if site.variant.name == "velora":
        shapes[storage.DIRECTION] = (width_of(site.in_features, compression_of(site)[0]),)
    if site.variant.name == "monteclora":
        draws = last_draw(site.rank, drawn_of(site)[0])
        shapes |= {name: tuple(draw.shape) for name, draw in draws.items()}
    if dora:
        shapes[storage.MAGNITUDE] = magnitude_shape(site)
    return shapes


def prefixes_of(plan: AdapterPlan) -> dict[str, str]:
    """Return what the names of the tensors of each site begin with in a file, by its name.

    PEFT wraps a module once for each of its parameters that are adapted, in their order.
    """
    attentions = planned_attentions(plan)
    inside: dict[str, list[str]] = {}
    for site in plan.sites:
        inside.setdefault(site.fqn, []).append(site.name)
    return {
        name: inner_prefix(in_file(fqn, attentions), depth)
        for fqn, names in inside.items()
        for depth, name in enumerate(reversed(names))
    }


def adapted(plan: AdapterPlan, model: nn.Module) -> Counter[str]:
    """Return how often an adapter adapts each module: all its parameters, and tied ones too."""
    tied = {fqn for site in plan.sites if site.tie for fqn in _tied(model, site.fqn)}
    return Counter([*tied, *(site.fqn for site in plan.sites)])


def with_doubled_out_proj(plan: AdapterPlan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors with twice the B of each attention's output projection."""
    prefixes = prefixes_of(plan)
    outputs = (s for s in plan.sites if s.layer.kind == "attention" and s.parameter is None)
    names = [f"{PREFIX}{prefixes[site.name]}lora_B.weight" for site in outputs]
    return {**state, **{name: 2 * state[name] for name in names}}


def embeddings(model: nn.Module, adapted: Mapping[str, int]) -> dict[str, nn.Module]:
    """Return the model's input and output embeddings by the names of their weights in a file."""
    if not isinstance(model, PreTrainedModel):
        return {}
    ends = (input_embedding(model), model.get_output_embeddings())
    return {
        f"{PREFIX}{inner_prefix(fqn, adapted.get(fqn, 0))}weight": module
        for fqn, module in storage.base_modules(model).items()
        if any(module is end for end in ends) and copies.base_tensor(module, "weight") is not None
    }


def ranks_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the rank of each linear layer among an adapter's tensors, by fqn."""
    end = ".lora_A.weight"
    found = {name: tensor for name, tensor in state.items() if name.endswith(end)}
    return {n.removeprefix(PREFIX).removesuffix(end): len(t) for n, t in found.items()}


def expected_shapes(plan: AdapterPlan, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a file of this adapter holds, by its name."""
    return {name: tuple(like.shape) for name, like in expected_tensors(plan, model).items()}


def without_values(site: SitePlan, module: nn.Module) -> dict[str, Tensor]:
    """Return tensors for a site by PEFT's names, for `overwrite` to copy a file's values into.

    Those of the file itself would change with it: it is mapped. With the zeros no weight changes.
    """
    make = torch.zeros if site.changes_base else torch.empty
    dtype = getattr(torch, site.dtype)
    return {name: make(shape, dtype=dtype) for name, shape in site.tensors.items()}


@torch.no_grad()
def overwrite(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into an adapter that has the same; its parameters stay the same.

    What a tied layer has in the file is the embedding's, and is passed over. Raises LoraFxError for
    a magnitude that says something of a site that has none.
    """
    own, prefixes = dict(state), _prefixes(model, adapter)
    for fqn, site in _started_sites(model, adapter):
        factors, start = split(state, prefixes[fqn])
        own |= factors
        rebase(site, *start, weight=state.get(name_of(fqn)))
    for name, tensor in live_tensors(model, adapter).items():
        if not tensor._is_view():
            tensor.copy_(own[f"{PREFIX}{name}"])
    norms = _magnitudes_of_plain_sites(model, adapter)
    trained = [name for name in norms if not is_near(state[f"{PREFIX}{name}"], norms[name])]
    if trained:
        raise LoraFxError(
            Diagnostic(
                "adapter-unexpected-tensor",
                f"`{PREFIX}{name}` has been trained, and the adapter has no `dora` there",
            )
            for name in trained
        )


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _of_site(module: storage.Site, adapter: str) -> Iterator[tuple[str, Tensor]]:
    if module.lora_branches[adapter].tied:
        yield from zip(
            ("lora_A.weight", "lora_B.weight"),
            module.lora_branches[adapter].tensors(),
            strict=True,
        )
    yield from storage.tensors(module, adapter).items()


def _magnitudes_of_plain_sites(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return by name the magnitudes that say what is so already; none if no site has one."""
    sites = {fqn: site for fqn, site in storage.sites(model) if adapter in site.lora_branches}
    plain = {f: site for f, site in sites.items() if site.lora_branches[adapter].magnitude is None}
    if len(plain) == len(sites):
        return {}
    prefixes = _prefixes(model, adapter)
    return {
        f"{prefixes[fqn]}{storage.MAGNITUDE}": magnitudes.start(
            site, site.lora_branches[adapter].tensors(), site.lora_arithmetic[adapter].scaling
        )
        for fqn, site in plain.items()
    }


def is_near(m: Tensor, norms: Tensor) -> bool:
    """Whether a magnitude from a file is these norms, but for how they were computed."""
    return torch.allclose(m.to(norms), norms, rtol=max(1e-4, 4 * torch.finfo(m.dtype).eps))


def inner_prefix(fqn: str, depth: int) -> str:
    """Return what the names of a module's tensors begin with below so many `base_layer`s."""
    return (f"{fqn}." if fqn else "") + "base_layer." * depth


def _tied(model: nn.Module, fqn: str) -> list[str]:
    tied = list(sharing_weight(model, model.get_submodule(fqn)))
    return [f for f, module in storage.base_modules(model).items() if module in tied]
