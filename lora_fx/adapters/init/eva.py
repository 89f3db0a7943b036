"""`init = eva`: A from the directions of a layer's inputs, ranks where they explain the most."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.init.batches import Batches, as_it_was, data_fault, on_device
from lora_fx.adapters.init.principal import PrincipalComponents
from lora_fx.adapters.weights.changed_weight import fingerprint
from lora_fx.plan.sites import SitePlan

_SEED = 42


@dataclass
class _Layer:
    """One site, its components, and how many it takes at most."""

    site: SitePlan
    most: int
    principal: PrincipalComponents
    inputs: str = ""
    skipped: int = 0

    def converged(self, rank: int) -> bool:
        known = self.principal
        return known.seen > 0 and bool((known.similarity[:rank] >= self.argument("tau")).all())

    def argument(self, name: str) -> Any:
        return self.site.init.argument(name)


def directions(
    model: nn.Module, sites: Sequence[SitePlan], batches: Batches
) -> dict[tuple[str, str], Tensor]:
    """Return A (rank, in) of each site, by adapter and fqn; an adapter's ranks add up as before.

    Paischer et al. 2024, arXiv 2410.07170, §3: the batches are gone through, over and over, until
    the components that are needed stay as they are; the ranks go to those that explain the largest
    shares of their layer's inputs. Layers with the same inputs share their components. Raises
    LoraFxError if that comes to no end. PEFT's `"eva"`.
    """
    layers = [_layer(site) for site in sites]
    ranks = [layer.most for layer in layers]
    with as_it_was(model), torch.no_grad():
        for index, batch in enumerate(_over_and_over(batches, layers)):
            given = on_device(batch, model)
            if index == 0:
                _run(model, given, [(layer, _name_inputs) for layer in layers])
                _share(layers)
            open_ = [
                layer
                for layer, rank in zip(layers, ranks, strict=True)
                if not layer.converged(rank)
            ]
            if index and not open_:
                break
            distinct = {id(layer.principal): layer for layer in open_}
            _run(model, given, [(layer, _take) for layer in distinct.values()])
            if all(layer.principal.seen for layer in layers):
                ranks = _ranks(layers)
    return {
        (layer.site.adapter, layer.site.fqn): _rows(layer, rank)
        for layer, rank in zip(layers, ranks, strict=True)
    }


def _layer(site: SitePlan) -> _Layer:
    most = min(round(site.rank * float(site.init.argument("rho"))), site.in_features)  # type: ignore[arg-type]
    return _Layer(site, most, PrincipalComponents(most, torch.Generator().manual_seed(_SEED)))


def _over_and_over(batches: Batches, layers: list[_Layer]) -> Iterator[Mapping[str, Any]]:
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        unseen = [layer for layer in layers if not layer.principal.seen]
        if not count:
            message = "the batches can be gone through once, and `eva` needs them again"
            known = any(layer.principal.seen for layer in layers)
            raise data_fault(message if known else "there is no batch in the data", "give a list")
        if unseen and unseen[0].skipped:
            message = f"no batch has the {unseen[0].most} tokens that `{unseen[0].site.name}` needs"
            raise data_fault(message, "give larger batches, or set a smaller `rho`")
        if unseen:
            raise data_fault(f"no batch reaches `{unseen[0].site.name}`", "leave it out")


def _run(model: nn.Module, given: dict[str, Any], seeing: Sequence[tuple[_Layer, Any]]) -> None:
    with ExitStack() as hooks:
        for layer, see in seeing:

            def hook(module: Any, args: Any, layer: _Layer = layer, see: Any = see) -> None:
                see(layer, _vectors(layer, args[0], given))

            module = model.get_submodule(layer.site.fqn)
            hooks.callback(module.register_forward_pre_hook(hook).remove)
        model(**given)


def _vectors(layer: _Layer, x: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Return the inputs of the tokens that count, (tokens, in) in float32."""
    masks = []
    if given.get("attention_mask") is not None:
        masks.append(given["attention_mask"].bool())
    if layer.argument("use_label_mask") and given.get("labels") is not None:
        masks.append(given["labels"] != layer.argument("label_mask_value"))
    x = x.detach().float()
    for mask in masks:
        if mask.shape != x.shape[:-1]:
            return x.reshape(-1, x.shape[-1])
    return x[torch.stack(masks).all(0)] if masks else x.reshape(-1, x.shape[-1])


def _name_inputs(layer: _Layer, vectors: Tensor) -> None:
    layer.inputs += fingerprint(vectors)


def _share(layers: list[_Layer]) -> None:
    """Let layers whose inputs are the same have one set of components, of the largest number."""
    groups: dict[tuple[str, str], list[_Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.site.adapter, layer.inputs or layer.site.fqn), []).append(layer)
    for group in groups.values():
        largest = max(group, key=lambda layer: layer.most)
        for layer in group:
            layer.most, layer.principal = largest.most, largest.principal


def _take(layer: _Layer, vectors: Tensor) -> None:
    if not vectors.isfinite().all():
        raise data_fault(f"what `{layer.site.name}` sees of the data is not finite", None)
    if len(vectors) < layer.most:
        layer.skipped += 1
    else:
        layer.principal.add(vectors)


def _ranks(layers: list[_Layer]) -> list[int]:
    """Give each adapter's ranks to its components of the largest shares."""
    ranks = [0] * len(layers)
    for adapter in dict.fromkeys(layer.site.adapter for layer in layers):
        own = [i for i, layer in enumerate(layers) if layer.site.adapter == adapter]
        shares = torch.cat([layers[i].principal.ratios[: layers[i].most].cpu() for i in own])
        owners = [i for i in own for _ in range(layers[i].most)]
        budget = sum(layers[i].site.rank for i in own)
        for place in shares.argsort(descending=True, stable=True)[:budget].tolist():
            ranks[owners[place]] += 1
    return ranks


def _rows(layer: _Layer, rank: int) -> Tensor:
    rows = layer.principal.components[:rank]
    if layer.argument("whiten"):
        rows = rows / layer.principal.singular_values[:rank, None].sqrt()
    return rows
