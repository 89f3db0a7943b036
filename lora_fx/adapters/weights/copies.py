"""Base parameters of which an adapter has its own: those of `train` and `bias`.

A module keeps every version of such a parameter, the base's and each adapter's, and has in force
that of the active adapter. Nothing in its forward changes, so that any module can be trained, a
compiled graph sees one more weight among its inputs, and with adapters off the base's own
parameter is back, bit for bit.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.modules import outside_adapters
from lora_fx.plan.offloaded import device_of, values_of

BASE = "base"
_NAME = "lora_own"


class Versions(nn.Module):
    """The parameters and buffers of one version of a module, under their own names.

    `twin` is what computes with them in a mixed batch, if anything does.
    """

    twin: tuple[nn.Module, ...] = ()

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def train(self, mode: bool = True) -> "Versions":
        """Let what computes with the version be in training, or not."""
        return _train(self, mode)

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers by name."""
        return {**self._parameters, **self._buffers}  # type: ignore[dict-item]


class Shared(nn.Module):
    """A version of one tensor that is another module's: of a layer whose weight is tied."""

    twin: tuple[nn.Module, ...] = ()

    def __init__(self, name: str, source: nn.Module, adapter: str) -> None:
        super().__init__()
        self._source = (name, source, adapter)  # in a tuple, or `source` would be a child

    def train(self, mode: bool = True) -> "Shared":
        """Let what computes with the version be in training, or not."""
        return _train(self, mode)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensor by name."""
        name, source, adapter = self._source
        return {name: tensors(source, adapter)[name]}


def _train(version: Any, mode: bool) -> Any:
    for module in (version, *version.twin):
        module.training = mode
    return version


def add(module: nn.Module, adapter: str, names: Iterable[str], trainable: bool) -> None:
    """Give an adapter a version of its own of a module's tensors, with the base's values.

    The tensors are the module's direct ones. Not in force until `activate`.
    """
    own: dict[str, Tensor] = {}
    for name, tensor in keep(module, names).items():
        values = values_of(module, name, tensor).to(device_of(module, tensor), copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        own[name] = nn.Parameter(values, requires_grad=trainable) if is_parameter else values
    _versions(module)[adapter] = Versions(own).train(module.training)


def share(module: nn.Module, adapter: str, name: str, source: nn.Module) -> None:
    """Let a tied module use an adapter's version of the tensor that it shares with `source`."""
    keep(module, [name])
    _versions(module)[adapter] = Shared(name, source, adapter).train(module.training)


def keep(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the base's version of these tensors; from now on the module keeps it apart."""
    if _NAME not in module._modules:
        setattr(module, _NAME, nn.ModuleDict({BASE: Versions({})}).train(module.training))
    base = _versions(module)[BASE]
    assert isinstance(base, Versions)
    for name in names:
        if name not in base.tensors():
            _put(base, name, _direct(module)[name])
    return {name: base.tensors()[name] for name in names}


def release(module: nn.Module) -> None:
    """Put the base's version back in force, and keep apart only what adapters have their own of."""
    base = _versions(module)[BASE]
    put(module, tensors(module, BASE))
    needed = {name for adapter in adapters_of(module) for name in tensors(module, adapter)}
    if not needed:
        del module._modules[_NAME]
    for name in tensors(module, BASE).keys() - needed if needed else ():
        base._parameters.pop(name, None)


def own_names(module: nn.Module) -> list[str]:
    """Return the names of a module's direct parameters, and of its buffers that are saved."""
    saved = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
    return [name for name in (*module._parameters, *saved) if name in _direct(module)]


def base_tensor(module: nn.Module, name: str) -> Tensor | None:
    """Return the base's version of a module's tensor, whichever is in force."""
    if _NAME in module._modules and name in tensors(module, BASE):
        return tensors(module, BASE)[name]
    return _direct(module).get(name)


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module that has versions, with its fqn."""
    for fqn, module in outside_adapters(model):
        if _NAME in module._modules:
            yield fqn, module


def is_of_base(fqn: str) -> bool:
    """Whether a module holds the base's version of tensors."""
    return f"{_NAME}.{BASE}" in fqn


def is_held(module: nn.Module) -> bool:
    """Whether any adapter has a version of a module."""
    return _NAME in module._modules


def has(module: nn.Module, adapter: str) -> bool:
    """Whether an adapter has a version of a module."""
    return _NAME in module._modules and adapter in _versions(module)


def adapters_of(module: nn.Module) -> list[str]:
    """Return the adapters that have a version of a module."""
    return [name for name in _versions(module) if name != BASE]


def tensors(module: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's version of a module's tensors, by their names in the module."""
    return version(module, adapter).tensors()


def version(module: nn.Module, adapter: str) -> Versions | Shared:
    """Return what holds an adapter's version of a module, or the base's."""
    found = _versions(module)[adapter]
    assert isinstance(found, Versions | Shared)
    return found


def remove(module: nn.Module, adapter: str) -> None:
    """Delete an adapter's version; it must not be in force."""
    del _versions(module)[adapter]


def require_one_each(model: nn.Module, adapters: tuple[str, ...]) -> None:
    """Raise LoraFxError if two of these adapters have a version of the same tensor."""
    for fqn, module in holders(model):
        found: dict[str, str] = {}
        for adapter in adapters:
            for name in tensors(module, adapter) if adapter in _versions(module) else ():
                other = found.setdefault(name, adapter)
                if other != adapter:
                    message = f"`{other}` and `{adapter}` both train `{fqn}.{name}`"
                    help = "activate one of them at a time"
                    raise LoraFxError((Diagnostic("adapter-conflict", message, help=help),))


def activate(model: nn.Module, adapters: tuple[str, ...]) -> None:
    """Put in force the versions of these adapters, the base's wherever they have none."""
    for _, module in holders(model):
        versions = _versions(module)
        wanted = dict(tensors(module, BASE))
        for adapter in adapters:
            if adapter in versions:
                wanted |= tensors(module, adapter)
        put(module, wanted)


def in_force(module: nn.Module) -> dict[str, Tensor]:
    """Return those tensors of adapters that are in the place of the base's, by name."""
    versions = [tensors(module, adapter) for adapter in adapters_of(module)]
    own = {id(tensor) for version in versions for tensor in version.values()}
    return {name: tensor for name, tensor in _direct(module).items() if id(tensor) in own}


def put(module: nn.Module, wanted: Mapping[str, Tensor]) -> None:
    """Put these tensors in force."""
    for name, tensor in wanted.items():
        _put(module, name, tensor)


def replace_base(module: nn.Module) -> None:
    """Make the tensors in force the base's."""
    base = _versions(module)[BASE]
    assert isinstance(base, Versions)
    for name in base.tensors():
        _put(base, name, _direct(module)[name])


def _versions(module: nn.Module) -> nn.ModuleDict:
    versions = module._modules[_NAME]
    assert isinstance(versions, nn.ModuleDict)
    return versions


def _direct(module: nn.Module) -> dict[str, Tensor]:
    found = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor
