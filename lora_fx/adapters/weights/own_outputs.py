"""Modules of which adapters have tensors of their own, in a mixed batch: each sample by its own.

Outside of mixed batches the active adapter's tensors are in force (`copies.py`), and nothing here
runs. In one the base's are, and the module is computed once more for each adapter that has all of
its tensors, on all rows; of those outputs each sample takes its adapter's. An adapter that has only
a bias costs one addition.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_fx.adapters.dynamic_class import base_of, specialise
from lora_fx.adapters.routing import Routing
from lora_fx.adapters.weights import copies
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph import ops
from lora_fx.plan.modules import outside_adapters
from lora_fx.plan.offloaded import offload_hook

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WITH_BIAS_LAST = (nn.Linear, Conv1D, nn.LayerNorm)
_EVERY_MODULE = frozenset(vars(nn.Module()))


class OwnOutputs(_Base):
    """Mixin for a module that has versions, and no modules inside it.

    `lora_whole` are the columns of adapters that have a version of all tensors, with a module that
    computes with it; `lora_biases` of those that have a bias alone, with what holds it.
    """

    lora_routing: Routing | None = None
    lora_whole: tuple[tuple[int, nn.Module], ...] = ()
    lora_biases: tuple[tuple[int, nn.Module], ...] = ()
    lora_alone: tuple[nn.Module, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module; in a mixed batch, let each sample have the output of its adapter."""
        output = super().forward(*args, **kwargs)
        shares = None if self.lora_routing is None else self.lora_routing.shares
        if not isinstance(shares, Tensor):
            return output
        if not isinstance(output, Tensor):
            raise _no_tensor(self)
        shares = shares.to(output.device)
        if self.lora_whole:
            own = [module(*args, **kwargs) for _, module in self.lora_whole]
            columns = [column for column, _ in self.lora_whole]
            base = [module(*args, **kwargs) for module in self.lora_alone]
            output = ops.mix(output, own, shares, columns, *base)
        if self.lora_biases:
            own = [holder.bias for _, holder in self.lora_biases]
            columns = [column for column, _ in self.lora_biases]
            trailing = output.ndim - 2 if isinstance(self, _CONVOLUTIONS) else 0
            output = ops.shift(output, own, self.bias, shares, columns, trailing)
        return output

    @property
    def mixes(self) -> bool:
        """Whether samples of the running call have outputs of their own here."""
        routed = self.lora_routing is not None and self.lora_routing.mixes
        return routed and bool(self.lora_whole or self.lora_biases)


def mark(module: nn.Module) -> None:
    """Let a module that has versions compute a mixed batch, in place, if it can be."""
    if not isinstance(module, OwnOutputs) and not has_modules_inside(module):
        specialise(module, OwnOutputs)


def has_modules_inside(module: nn.Module) -> bool:
    """Whether a module of the base calls others, which a second call would call again."""
    return any(not name.startswith("lora_") for name in module._modules)


def route(model: nn.Module, adapters: tuple[str, ...], routing: Routing) -> None:
    """Say which adapter each column of the shares of a mixed batch is of."""
    routing.versioned = tuple(module for _, module in copies.holders(model))
    for module in routing.versioned:
        if isinstance(module, OwnOutputs):
            module.lora_routing = routing
            _route(module, adapters)


def _route(module: OwnOutputs, adapters: tuple[str, ...]) -> None:
    own = {
        column: copies.tensors(module, name)
        for column, name in enumerate(adapters)
        if copies.has(module, name)
    }
    biased = [column for column in own if own[column].keys() == {"bias"} and _adds_bias(module)]
    versions = {column: copies.version(module, adapters[column]) for column in own}
    module.lora_biases = tuple((column, versions[column]) for column in biased)
    whole = [column for column in own if column not in biased]
    module.lora_whole = tuple((column, _twin(module, versions[column])) for column in whole)
    has_more = whole and hasattr(module, "lora_arithmetic")
    base = copies.version(module, copies.BASE)
    module.lora_alone = (_twin(module, base),) if has_more or _has_rows(module) else ()


def _has_rows(module: nn.Module) -> bool:
    return hasattr(module, "lora_tokens")


def _adds_bias(module: nn.Module) -> bool:
    """Whether a module's output is one without a bias, and the bias, along a dimension of it."""
    return isinstance(module, (*_WITH_BIAS_LAST, *_CONVOLUTIONS))


def _twin(module: nn.Module, version: "copies.Versions | copies.Shared") -> nn.Module:
    """Return a module like this one with the tensors of a version, the base's where it has none.

    It is no child of any module, is in training when the version is, and has no hooks.
    """
    cls = base_of(type(module))
    made: nn.Module = cls.__new__(cls)  # type: ignore[call-overload]
    nn.Module.__init__(made)
    kept = (name for name in vars(module) if name not in _EVERY_MODULE)
    vars(made).update({n: vars(module)[n] for n in kept if not n.startswith(("lora_", "_hf"))})
    for kind, own in (("_parameters", made._parameters), ("_buffers", made._buffers)):
        for name in getattr(module, kind):
            if not name.startswith("lora_"):
                own[name] = copies.base_tensor(module, name)  # type: ignore[assignment]
    for name, tensor in version.tensors().items():
        if isinstance(tensor, nn.Parameter):
            made._parameters[name] = tensor
        else:
            made._buffers[name] = tensor
    made.training = version.training
    version.twin = (made,)  # in a tuple, or it would be a child
    return made


def unroutable(model: nn.Module, training: bool) -> Iterator[tuple[str, str]]:
    """Yield adapters whose versions cannot differ from sample to sample, and why."""
    for fqn, module in copies.holders(model):
        why = _why_not(module, training)
        if why is not None:
            yield from ((name, f"trains `{fqn}`, {why}") for name in copies.adapters_of(module))


def why_never(module: nn.Module) -> str | None:
    """Return why no copies of a module can differ from sample to sample, None if they can."""
    if any(True for _ in module.parameters(recurse=False)) and has_modules_inside(module):
        return "which has tensors of its own and modules inside it"
    return None


def _why_not(module: nn.Module, training: bool) -> str | None:
    if not isinstance(module, OwnOutputs):
        return "which has tensors of its own and modules inside it"
    if offload_hook(module) is not None:
        return "which is offloaded"
    if training and isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "which mixes the samples of a batch when it learns"
    return None


def _no_tensor(module: nn.Module) -> LoraFxError:
    message = f"a mixed batch reaches a `{type(module).__name__}`, which gives more than a tensor"
    help = "train other modules, or call the model with one adapter at a time: `set_adapter`"
    return LoraFxError((Diagnostic("not-routable", message, help=help),))


def of_model(model: nn.Module) -> Iterator[tuple[str, OwnOutputs]]:
    """Yield every such module with its fqn."""
    for fqn, module in outside_adapters(model):
        if isinstance(module, OwnOutputs):
            yield fqn, module
