"""What a model is made of, for a first file."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lora_fx.plan.folding import numberless
from lora_fx.plan.kinds import layer_of
from lora_fx.plan.memory import count_elements
from lora_fx.plan.modules import Modules, modules_of
from lora_fx.plan.selectors import is_inside
from lora_fx.spec.starter import Outline, Shape


def outline_of(tree: nn.Module) -> Outline:
    """Return the outline of a module tree, its linear layers counted over its layers."""
    modules = modules_of(tree)
    outputs, inputs = (_embedding(tree, which) for which in ("output", "input"))
    heads = _task_heads(tree, outputs)
    head = next((fqn for fqn, module in modules.by_fqn.items() if module is outputs), None)
    adapted = [f for f in modules.by_fqn if f in modules.linears and not is_inside(f, heads)]
    experts = _experts(modules)
    return Outline(
        kind=type(tree).__name__,
        parameters=sum(count_elements(parameter) for parameter in tree.parameters()),
        stacks=_stacks(modules, adapted),
        shapes=_shapes(modules, [*adapted, *([head] if head else [])]),
        names=_names(modules, adapted),
        narrowest=min((_narrowest(modules, name) for name in [*adapted, *experts]), default=1),
        head=head,
        heads=heads,
        norm=_norm(modules, heads),
        experts=_pattern(experts),
        plain=all(isinstance(modules.by_fqn[fqn], nn.Linear) for fqn in adapted),
        tokens=isinstance(inputs, nn.Embedding),
    )


def _embedding(tree: Any, which: str) -> nn.Module | None:
    get = getattr(tree, f"get_{which}_embeddings", None)
    return get() if get else None


def _task_heads(tree: Any, outputs: nn.Module | None) -> list[str]:
    """Return what stands beside the base model and is no output head of a language model."""
    base = getattr(tree, "base_model", tree)
    if base is tree:
        return []
    return [
        name
        for name, child in tree.named_children()
        if not any(module in (base, outputs) for module in child.modules())
        and any(True for _ in child.parameters())
    ]


def _stacks(modules: Modules, adapted: Iterable[str]) -> dict[str, int]:
    places = [place for fqn in adapted if (place := modules.place(fqn)) is not None]
    return {place.stack.fqn: len(place.stack.layers) for place in places}


def _shapes(modules: Modules, linears: Iterable[str]) -> list[Shape]:
    layers = ((numberless(fqn), modules.layer(fqn)) for fqn in linears)
    sizes = Counter((name, x.in_features, x.out_features) for name, x in layers if x is not None)
    return [Shape(*size, count) for size, count in sizes.items()]


def _names(modules: Modules, adapted: Sequence[str]) -> list[str]:
    """Return the last names of linear layers inside stacks that are those of no other module."""
    others = {fqn.rpartition(".")[2] for fqn in modules.by_fqn if fqn not in modules.linears}
    inside = (fqn.rpartition(".")[2] for fqn in adapted if modules.place(fqn) is not None)
    return [name for name in dict.fromkeys(inside) if name not in others and not name.isdigit()]


def _narrowest(modules: Modules, name: str) -> int:
    layer = modules.layer(name)
    assert layer is not None
    return min(layer.in_features, layer.out_features)


def _norm(modules: Modules, heads: Sequence[str]) -> str | None:
    norms = [
        fqn
        for fqn, module in modules.by_fqn.items()
        if "Norm" in type(module).__name__
        and modules.place(fqn) is None
        and not is_inside(fqn, heads)
        and any(True for _ in module.parameters())
    ]
    return norms[-1] if norms else None


def _experts(modules: Modules) -> list[str]:
    """Return the stacked weights of experts: parameters of three dimensions."""
    return [
        name
        for name, parameter in modules.parameters.items()
        if "Experts" in type(modules.owner(name)).__name__
        and parameter.ndim == 3
        and layer_of(modules.owner(name)) is None
    ]


def _pattern(experts: Iterable[str]) -> str | None:
    """Return one pattern of these parameters, which stand in modules of one name."""
    owners = dict.fromkeys(numberless(name.rpartition(".")[0]) for name in experts)
    names = dict.fromkeys(name.rpartition(".")[2] for name in experts)
    if len(owners) != 1:
        return None
    last = ",".join(names)
    return f"{next(iter(owners))}.{last if len(names) == 1 else f'{{{last}}}'}"
