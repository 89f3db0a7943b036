"""One adapter of each kind of layer, here, in PEFT and as dense weights."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

import lora_fx
from lora_fx.adapters.peft.keys import live_tensors
from tests.architectures import ARCHITECTURES, CONVOLUTIONAL
from tests.example_inputs import example_inputs

Inputs = Callable[[Any], dict[str, Tensor]]
PREFIX = "base_model.model."
IDS = (0, 3, 7, 50)


@dataclass(frozen=True)
class Kind:
    """A spec's adapter and the PEFT config that means the same, on a base.

    `parameters` are those that it adapts of a module, in the module's order.
    """

    base: Callable[[], PreTrainedModel]
    adapter: str
    config: Mapping[str, Any]
    scaling: float = 5 / 3
    tied: bool = False
    ids: tuple[int, ...] = field(default=IDS)
    parameters: tuple[str, ...] = ()


def of(name: str, **config: Any) -> Callable[[], PreTrainedModel]:
    """Build one of the architectures, with changes to its config."""

    def build() -> PreTrainedModel:
        with torch.device("meta"):
            changed = (ARCHITECTURES | CONVOLUTIONAL)[name]()
        for key, value in config.items():
            setattr(changed.config, key, value)
        torch.manual_seed(0)
        return type(changed)(changed.config).eval()

    return build


def ours(kind: Kind, backend: str | None = None, unit: str = "layers") -> PreTrainedModel:
    """The adapter compiled; none of its tensors is zero, or the base's."""
    text = f"""lora 1
    adapter default {{ rank = 3  alpha = 5  init = random  {kind.adapter} }}
    compile {{ unit = {unit} }}"""
    model = lora_fx.compile(kind.base(), text, backend=backend)
    scatter(model)
    return model


def padded(model: nn.Module) -> dict[str, Tensor]:
    """One batch whose first token, if there are tokens, is the padding token."""
    inputs = example_inputs(model)
    if "input_ids" in inputs:
        inputs["input_ids"][:, 0] = model.config.pad_token_id
    return inputs


def scatter(model: nn.Module, name: str = "default") -> None:
    """Move every tensor of an adapter away from where it starts, the same way at every call."""
    generator = torch.Generator().manual_seed(2)
    for tensor in live_tensors(model, name).values():
        if tensor.is_leaf and tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * 0.1
            tensor.data.add_(noise.to(tensor.dtype))


def state_of(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The tensors of our adapter, by their names in a file."""
    return model.get_adapter_state_dict(name)


def by_peft(kind: Kind, state: Mapping[str, Tensor]) -> nn.Module:
    """PEFT's model with these tensors."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": [], **kind.config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(kind.base(), LoraConfig(**settings))
    found = set_peft_model_state_dict(model, dict(state))
    assert not found.unexpected_keys
    missing = [key for key in found.missing_keys if "lora_" in key or "default" in key]
    assert not [key for key in missing if "lm_head.token_adapter" not in key]
    return model.eval()


def step(model: nn.Module, inputs_of: Inputs = example_inputs) -> dict[str, Tensor]:
    """Loss, outputs and the gradients of our adapter, by their names in a file."""
    result = forward(model, inputs_of(model))
    live = live_tensors(model, "default").items()
    leaves = {f"{PREFIX}{key}": tensor for key, tensor in live if tensor.requires_grad}
    return result | {key: tensor.grad for key, tensor in leaves.items() if tensor.is_leaf}


def step_of_peft(model: nn.Module, inputs_of: Inputs = example_inputs) -> dict[str, Tensor]:
    """The same of PEFT's model, which has two parameters for each that a tied layer shares."""
    result = forward(model, inputs_of(model.get_base_model()))
    parameters = model.named_parameters(remove_duplicate=False)
    grads = {name: p.grad for name, p in parameters if p.grad is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = get_peft_model_state_dict(
            model, model.state_dict() | grads, save_embedding_layers=False
        )
    named = {key: tensor for key, tensor in named.items() if "velora_embed" not in key}
    tied = {key: named.pop(key) for key in list(named) if "lm_head.lora" in key}
    for key, grad in tied.items():
        leaf = "A" if "lora_B" in key else "B"
        (own,) = (key for key in named if key.endswith(f"lora_embedding_{leaf}"))
        named[own] = named[own] + grad.T
    return result | named


def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Loss and outputs, and a backward pass."""
    model.zero_grad()
    result = model(**inputs)
    result.loss.backward()
    return {k: result[k].detach() for k in result if k == "loss" or k.endswith("logits")}


def dense(kind: Kind, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Loss, outputs and gradients in float64, every weight materialised."""
    distinct = {t.data_ptr(): t.double().clone().requires_grad_() for t in state.values()}
    leaves = {key: distinct[tensor.data_ptr()] for key, tensor in state.items()}
    outputs = dense_forward(kind, leaves)
    return outputs | {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


def dense_forward(kind: Kind, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Loss and outputs in float64, and a backward pass to the leaves."""
    base = kind.base().double()
    if kind.parameters:
        base.set_experts_implementation("eager")
    weights = materialised(base, leaves, kind)
    result = functional_call(base, weights, args=(), kwargs=example_inputs(base), tie_weights=False)
    result.loss.backward()
    return {k: result[k].detach() for k in result if k == "loss" or k.endswith("logits")}


def materialised(base: nn.Module, leaves: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """The parameters that an adapter changes, as it changes them.

    What a file has of a tied layer is the embedding's own, and is passed over.
    """
    parameters = dict(base.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for key, leaf in leaves.items():
        name = key.removeprefix(PREFIX).replace(".base_layer", "")
        fqn, _, own = name.partition(".token_adapter.")
        if own:
            _change(found, parameters, f"{fqn}.weight", lambda w, v=leaf: _rows(w, v, kind), True)
        elif ".lora_" not in name:
            _change(found, parameters, name, lambda _, v=leaf: v, kind.tied)
    for key, B in leaves.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_embedding_B"):
            fqn = name.removesuffix(".lora_embedding_B")
            delta = kind.scaling * (B @ leaves[key.replace("_B", "_A")]).T
            m = leaves.get(f"{PREFIX}{fqn}.lora_magnitude_vector")
            _change(
                found,
                parameters,
                f"{fqn}.weight",
                lambda w, d=delta, m=m: _with_norms(w + d, m, 0),
                kind.tied,
            )
        elif name.endswith(".lora_B.bias"):
            fqn = name.removesuffix(".lora_B.bias")
            delta = kind.scaling * B
            _change(found, parameters, f"{fqn}.bias", lambda b, d=delta: b + d)
        elif name.endswith(".lora_B.weight") and not (kind.tied and "lm_head" in name):
            fqn = name.removesuffix(".lora_B.weight")
            if kind.parameters:
                _change_parameter(found, parameters, base, kind, fqn, B, leaves)
                continue
            A = leaves[key.replace("lora_B", "lora_A")]
            inputs = getattr(base.get_submodule(fqn), "in_features", A.shape[1])
            weight = parameters[f"{fqn}.weight"]
            if A.dim() > 2:
                delta = kind.scaling * (B.flatten(1) @ A.flatten(1)).view_as(weight)
            else:
                delta = kind.scaling * (_whole(B, A.shape[0]) @ _whole(A, inputs))
            turned = type(base.get_submodule(fqn)).__name__ == "Conv1D"
            delta = delta.T if turned else delta
            m = leaves.get(f"{PREFIX}{fqn}.lora_magnitude_vector")
            _change(
                found,
                parameters,
                f"{fqn}.weight",
                lambda w, d=delta, m=m, over=0 if turned else 1: _with_norms(w + d, m, over),
            )
    return found


def _change_parameter(
    found: dict[str, Tensor],
    parameters: Mapping[str, Tensor],
    base: nn.Module,
    kind: Kind,
    fqn: str,
    B: Tensor,
    leaves: Mapping[str, Tensor],
) -> None:
    """Add B_e A_e to the matrix of each expert: A lies expert by expert, B rank by rank."""
    A = leaves[f"{PREFIX}{fqn}.lora_A.weight"]
    owner = fqn.replace(".base_layer", "")
    parameter = kind.parameters[-1 - fqn.count(".base_layer")]
    module = base.get_submodule(owner)
    W = module.get_parameter(parameter)
    if W.ndim == 2:
        delta = kind.scaling * (B @ A)
    else:
        E = len(W)
        split = A.reshape(E, -1, A.shape[1]), B.reshape(len(B), -1, E)
        letters = "io" if getattr(module, "is_transposed", False) else "oi"
        delta = kind.scaling * torch.einsum(f"eri,ore->e{letters}", *split)
    _change(found, parameters, f"{owner}.{parameter}", lambda w: w + delta)


def _whole(factor: Tensor, columns: int) -> Tensor:
    """The matrix whose blocks are stored below each other."""
    return torch.block_diag(*factor.chunk(columns // factor.shape[1]))


def _with_norms(weight: Tensor, m: Tensor | None, over: int) -> Tensor:
    """DoRA's weight: each output has the norm m, and the norm it had is a constant."""
    if m is None:
        return weight
    if weight.dim() > 2:
        gain = m.flatten() / weight.detach().flatten(1).norm(dim=1)
        return weight * gain.view(-1, *(1,) * (weight.dim() - 1))
    return weight * (m / weight.detach().norm(dim=over)).unsqueeze(over)


def _change(
    found: dict[str, Tensor],
    parameters: Mapping[str, Tensor],
    name: str,
    change: Callable[[Tensor], Tensor],
    tied: bool = False,
) -> None:
    same = [n for n, p in parameters.items() if p is parameters[name]] if tied else [name]
    for one in same:
        found[one] = change(found.get(one, parameters[one]))


def _rows(weight: Tensor, rows: Tensor, kind: Kind) -> Tensor:
    return weight.index_copy(0, torch.tensor(kind.ids), rows)
