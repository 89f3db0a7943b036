"""What configs say of a stack of layers, made true of a new stack."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

_ENDS = ("encoder", "decoder")


def configs(tree: nn.Module) -> Iterator[Any]:
    """Yield every distinct config object in the tree, nested ones too."""
    seen: set[int] = set()
    for module in tree.modules():
        config = getattr(module, "config", None)
        nested = [v for v in vars(config).values() if hasattr(v, "to_dict")] if config else []
        for one in (config, *nested):
            if one is not None and id(one) not in seen:
                seen.add(id(one))
                yield one


def follow(tree: nn.Module, stack: str, count: int, old: Sequence[int]) -> None:
    """Set the number of a stack's layers, and what configs list for each layer, in place.

    `count` was the number, `old[new]` is the former index of each layer. Changed are the configs of
    the modules that the stack stands in and of its layers, and configs equal to one of them; in
    others of their class the number that is named for the encoder or decoder the stack stands in.
    """
    own = [
        module.config
        for fqn, module in tree.named_modules()
        if not fqn or f"{stack}.".startswith(f"{fqn}.") or fqn.startswith(f"{stack}.")
        if hasattr(module, "config")
    ]
    end = next((end for end in _ENDS for part in stack.split(".") if end in part), None)
    alike = [c for c in configs(tree) if any(type(c) is type(one) for one in own)]
    names = [_counts(c, end, any(c is o or vars(c) == vars(o) for o in own)) for c in alike]
    for config, counts in zip(alike, names, strict=True):
        _follow(config, [name for name in counts if getattr(config, name) == count], end, old)


def _counts(config: Any, end: str | None, own: bool) -> list[str]:
    """Return the names under which a config has the number of layers of an end."""
    by_end = (f"{end}_layers", f"num_{end}_layers", f"{end}_num_hidden_layers") if end else ()
    names = [name for name in by_end if hasattr(config, name)]
    both = getattr(config, "is_encoder_decoder", False) and not getattr(config, "is_decoder", False)
    if own and hasattr(config, "num_hidden_layers") and not (both and names):
        names.append("num_hidden_layers")
    return names


def _follow(config: Any, counts: Sequence[str], end: str | None, old: Sequence[int]) -> None:
    if not counts:
        return
    before = getattr(config, counts[0])
    lists = {
        name: [value[i] for i in old]
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == before and _is_per_layer(name, end)
    }
    for name in counts:
        setattr(config, name, len(old))
    for name, value in lists.items():
        setattr(config, name, value)


def _is_per_layer(name: str, end: str | None) -> bool:
    """Tell lists of these layers from others that may happen to be as long."""
    of_others = any(other in name for other in _ENDS if end and other != end)
    return not (of_others or name == "architectures" or name.endswith(("token_id", "token_ids")))
