"""Give a live module a subclass of its own class, made on the spot, that can still be pickled.

`module.__class__ = subclass(type(module), Mixin)` changes what a module does and nothing else:
`isinstance`, parameter names, hooks and the printed class name stay. torch's `fully_shard` works
the same way.
"""

import copyreg
import inspect
import types
from functools import cache
from typing import Any

from torch import nn

Beneath = type | tuple[type, ...] | None
_KEPT = ("forward", "_old_forward")  # the second is what accelerate's wrapper around it calls


class _Made(type):
    """Marks classes made here, so that pickle can be told how to make them again."""

    __lora_fx__: tuple[Any, ...]


@cache
def subclass(base: type, mixin: type, *keywords: str) -> type:
    """Return the subclass `(mixin, base)` of `base` under the name, module and doc of `base`.

    One class per pair, so that equal modules share one type and one compiled graph; `forward`
    keeps the signature of `base`, with more `keywords` if there are any. Pickles as the pair.
    """
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if "forward" in vars(mixin):
        shown = _with_keywords(inspect.signature(base.forward), keywords)
        namespace["forward"] = _with_signature(shown, vars(mixin)["forward"])
    made = _metaclass(type(base))(base.__name__, (mixin, base), namespace)
    made.__lora_fx__ = (base, mixin, *keywords)
    return made


def base_of(cls: type) -> type:
    """Return the class a made class stands in for; any other class is returned as it is."""
    while "__lora_fx__" in vars(cls):
        cls = cls.__lora_fx__[0]
    return cls


def specialise(
    module: nn.Module, mixin: type, beneath: Beneath = None, keywords: tuple[str, ...] = ()
) -> None:
    """Make `module` an instance of `mixin` too, in place; what mixins `beneath` add runs after.

    The signature of `forward` shows these `keywords` more. A `forward` of the class that is kept
    in the instance, as accelerate's hooks do, follows.
    """
    kept = [name for name in _KEPT if _is_of_class(vars(module).get(name), module)]
    module.__class__ = _specialised(type(module), mixin, beneath, keywords)
    for name in kept:
        vars(module)[name] = types.MethodType(type(module).forward, module)


def generalise(module: nn.Module) -> None:
    """Make `module` an instance of the class that it had before any `specialise`, in place."""
    kept = [name for name in _KEPT if _is_of_class(vars(module).get(name), module)]
    module.__class__ = base_of(type(module))
    for name in kept:
        vars(module)[name] = types.MethodType(type(module).forward, module)


def rebase(module: nn.Module, base: type) -> None:
    """Let `module` be of another class beneath all that `specialise` has made of it, in place."""
    kept = [name for name in _KEPT if _is_of_class(vars(module).get(name), module)]
    module.__class__ = _rebased(type(module), base)
    for name in kept:
        vars(module)[name] = types.MethodType(type(module).forward, module)


def _rebased(cls: type, base: type) -> type:
    if "__lora_fx__" not in vars(cls):
        return base
    beneath, mixin, *keywords = cls.__lora_fx__  # type: ignore[attr-defined]
    return subclass(_rebased(beneath, base), mixin, *keywords)


def _specialised(cls: type, mixin: type, beneath: Beneath, keywords: tuple[str, ...] = ()) -> type:
    if beneath is not None and issubclass(cls, beneath):
        base, *own = cls.__lora_fx__  # type: ignore[attr-defined]
        return subclass(_specialised(base, mixin, beneath), *own)
    return subclass(cls, mixin, *keywords)


def has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether something replaced the `forward` of a module, so that its class's is not called."""
    kept = [vars(module)[name] for name in _KEPT if name in vars(module)]
    return bool(kept) and not _is_of_class(kept[-1], module)


def _is_of_class(function: Any, module: nn.Module) -> bool:
    if getattr(function, "__self__", None) is not module:
        return False
    return any(vars(c).get("forward") is function.__func__ for c in type(module).__mro__)


def _with_keywords(shown: inspect.Signature, names: tuple[str, ...]) -> inspect.Signature:
    given = list(shown.parameters.values())
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    behind = [p for p in given if p.kind is inspect.Parameter.VAR_KEYWORD]
    return shown.replace(parameters=[*(p for p in given if p not in behind), *more, *behind])


def _with_signature(shown: inspect.Signature, function: types.FunctionType) -> types.FunctionType:
    """Show the same function under another signature: callers read column names from it."""
    twin = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__signature__ = shown  # type: ignore[attr-defined]
    return twin


@cache
def _metaclass(base: type) -> type:
    if issubclass(base, _Made):
        return base
    made = _Made if base is type else type("_Made", (_Made, base), {})
    copyreg.pickle(made, lambda cls: (subclass, cls.__lora_fx__))
    return made
