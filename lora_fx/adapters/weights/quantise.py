"""`quantize`: linear layers, sites or not, become bitsandbytes' layers, one after the other.

A layer changes its class and its weight and stays the same object, with its hooks, its bias and its
adapters; what its float weight took is free as soon as nothing else holds it. Weights are packed
where they are, CPU or GPU, bit for bit as transformers packs them with a `BitsAndBytesConfig`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn

from lora_fx.adapters.accelerator import start_device
from lora_fx.adapters.dynamic_class import rebase
from lora_fx.adapters.sites import magnitudes
from lora_fx.plan.packed import packing_of, unpacked
from lora_fx.plan.quantization import QuantizedModule
from lora_fx.plan.rules import AdapterPlan

_BLOCK = 64


@torch.no_grad()
def quantise(
    tree: nn.Module,
    quantized: Mapping[str, QuantizedModule],
    started: Iterable[AdapterPlan],
    report: Callable[[str, int, int], None],
) -> None:
    """Pack the weights of these modules, in place; those that are packed already stay.

    Layers that share a weight share the packed one. DoRA's magnitudes of the adapters that have
    `started` start on what is packed.
    """
    made: dict[int, tuple[Tensor, Any]] = {}
    todo = {n: q for n, q in quantized.items() if packing_of(tree.get_submodule(n)) is None}
    for done, (fqn, planned) in enumerate(todo.items()):
        report(f"quantising `{fqn}`", done, len(todo))
        module: Any = tree.get_submodule(fqn)
        weight = module._parameters["weight"]
        if id(weight) not in made:
            made[id(weight)] = weight, _packed(weight, planned)
        _become(module, planned, made[id(weight)][1])
        if not _is_shared(tree, weight):
            del made[id(weight)]
        del weight
    for adapter in started:
        for site in adapter.sites:
            if site.variant.name == "dora" and site.fqn in todo:
                module = tree.get_submodule(site.fqn)
                device = start_device(site, module.weight.device)
                magnitudes.begin(module, adapter.name, device)


def _is_shared(tree: nn.Module, weight: Tensor) -> bool:
    return any(own is weight for own in tree.parameters())


def pack_again(module: Any, weight: Tensor) -> None:
    """Let a layer in 4 or 8 bits have another weight (out, in), packed as its own is."""
    packing = packing_of(module)
    assert packing is not None
    nested, storage = bool(packing.nested), module.weight.dtype
    _put(module, _pack(weight.to(packing.dtype), packing.method, nested, storage))


def packed_values(weight: Tensor, planned: QuantizedModule) -> Tensor:
    """Return the values (out, in) that a weight has once it is packed, in the dtype of these."""
    module = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    _become(module, planned, _packed(weight, planned))
    return unpacked(module)


def _packed(weight: Tensor, planned: QuantizedModule) -> Any:
    nested = dict(planned.method.arguments).get("double_quant") is True
    return _pack(weight, planned.method.name, nested, getattr(torch, planned.storage))


def _pack(weight: Tensor, method: str, nested: bool, storage: torch.dtype) -> Any:
    """Return the packed numbers, and the state or scales that belong to them."""
    weight = weight.detach().contiguous()
    if method == "int8":
        numbers, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
        return numbers, scales
    how = {"blocksize": _BLOCK, "compress_statistics": nested, "quant_type": method}
    return quantize_4bit(weight, **how, quant_storage=storage)


def _become(module: Any, planned: QuantizedModule, packed: Any) -> None:
    """Make a linear layer one of bitsandbytes, with this weight."""
    made = _layer(module, planned)
    for name, value in vars(made).items():
        if name not in vars(module):
            setattr(module, name, value)
    module._load_state_dict_pre_hooks.update(made._load_state_dict_pre_hooks)
    _put(module, packed)
    rebase(module, type(made))


def _put(module: Any, packed: Any) -> None:
    numbers, state = packed
    rows: Any = Int8Params
    blocks: Any = Params4bit
    if isinstance(state, Tensor):
        weight = rows(numbers, requires_grad=False, has_fp16_weights=False)
        module.state.CB, module.state.SCB = weight.data, state
    else:
        weight = blocks(
            numbers,
            requires_grad=False,
            quant_state=state,
            blocksize=_BLOCK,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=numbers.dtype,
            module=module,
            bnb_quantized=True,
        )
        module.quant_state = state
        module.support_avx512bf16_for_cpu = False
    module._parameters["weight"] = weight


def _layer(module: nn.Linear, planned: QuantizedModule) -> nn.Module:
    """Return a layer of bitsandbytes without values, in the place of a linear one."""
    sizes, biased = (module.in_features, module.out_features), module.bias is not None
    if planned.method.name == "int8":
        threshold = planned.method.argument("threshold")
        settings = {"has_fp16_weights": False, "threshold": threshold, "device": "meta"}
        return Linear8bitLt(*sizes, biased, **settings)
    return Linear4bit(
        *sizes,
        biased,
        compute_dtype=getattr(torch, planned.method.argument("compute_dtype").name),  # type: ignore[union-attr]
        compress_statistics=bool(planned.method.argument("double_quant")),
        quant_type=planned.method.name,
        quant_storage=getattr(torch, planned.storage),
        device="meta",
    )
