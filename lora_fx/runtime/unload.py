"""Make a compiled model a plain one again: no class, child or attribute of lora_fx is left."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_fx.adapters import token_rows
from lora_fx.adapters.dynamic_class import base_of, generalise
from lora_fx.adapters.routing import unrouted
from lora_fx.adapters.weights import copies
from lora_fx.adapters.weights.merged import Merged
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.folding import numberless
from lora_fx.plan.modules import input_embedding, outside_adapters
from lora_fx.plan.offloaded import hooks_of, offload_hook
from lora_fx.plan.packed import packing_of
from lora_fx.runtime.loss import restore_loss


def require_unloadable(model: nn.Module, adapters: Sequence[str]) -> None:
    """Raise LoraFxError if what these adapters trained of the base has no place in it."""
    holders = (*copies.holders(model), *token_rows.holders(model))
    for fqn, module in holders:
        own = (copies.has(module, name) or token_rows.rows_of(module, name) for name in adapters)
        if offload_hook(module) is not None and any(own):
            message = f"`{numberless(fqn)}` is offloaded, and what was trained of it has no place"
            help = "load the model without offloading"
            raise LoraFxError((Diagnostic("cannot-merge", message, help=help),))


def with_rows(model: nn.Module, adapters: Sequence[str]) -> Merged:
    """Return the weights in force with these adapters' rows in them, one where they share one."""
    found: dict[nn.Module, dict[str, Tensor]] = {}
    made: dict[int, Tensor] = {}
    for _, holder in token_rows.holders(model):
        weight: Tensor = holder.weight  # type: ignore[assignment]
        for rows in (one for name in adapters for one in token_rows.rows_of(holder, name)):
            values = made.get(id(weight), weight.detach())
            own = rows.weight.detach().to(weight.dtype)
            made[id(weight)] = values.index_copy(0, rows.tokens, own)
        if id(weight) in made:
            found[holder] = {"weight": made[id(weight)]}
    return found


def put_for_good(results: Merged) -> None:
    """Let modules have these tensors as parameters of their own; one for several stays one."""
    parameters: dict[int, nn.Parameter] = {}
    for module, tensors in results.items():
        for name, tensor in tensors.items():
            made = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            module._parameters[name] = made


def unpack_for_good(results: Merged) -> None:
    """Make those of these modules that are in 4 or 8 bits plain ones with these tensors."""
    for module in (module for module in results if packing_of(module) is not None):
        from lora_fx.adapters.weights.dequantise import make_plain  # imports bitsandbytes

        make_plain(module, results[module])


def untie(model: nn.Module) -> None:
    """Let the config say so if input and output embeddings no longer share a weight."""
    if not isinstance(model, PreTrainedModel):
        return
    ends = (input_embedding(model), model.get_output_embeddings())
    weights = [getattr(end, "weight", None) for end in ends]
    if None not in weights and weights[0] is not weights[1]:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def strip(model: nn.Module) -> None:
    """Leave of every module what its class has, with the tensors in force, in place."""
    recomputes = getattr(model, "lora_fx_checkpoint", "none") == "layers"
    restore_loss(model)
    for _, module in list(outside_adapters(model)):
        for hook in hooks_of(module):
            hook.__class__ = base_of(type(hook))
        weight = module._parameters.get("weight")
        if weight is not None and getattr(module, "lora_room", False):
            module._parameters["weight"] = nn.Parameter(weight.detach().contiguous(), False)
        for kept in (module._modules, module._buffers, vars(module)):
            for name in [name for name in kept if name.startswith("lora_")]:
                del kept[name]
        unrouted(module)
        module._non_persistent_buffers_set -= {"lora_scalings", "lora_mixed_scalings"}
        generalise(module)
        if type(module) is nn.Linear and vars(module).pop("source_cls", None) is Conv1D:
            _turn_back(module)
    if recomputes and isinstance(model, PreTrainedModel):
        model.gradient_checkpointing_disable()


def _turn_back(module: nn.Module) -> None:
    """Make a plain linear layer the `Conv1D` that transformers packed as a linear one."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    made = Conv1D(*weight.shape)
    made.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)
    made.bias.data = made.bias.data.to(weight) if bias is None else bias.detach()
    for name in ("in_features", "out_features"):
        del vars(module)[name]
    module.__class__ = Conv1D
    vars(module).update({"nf": made.nf, "nx": made.nx})
    module._parameters.update(made._parameters)
