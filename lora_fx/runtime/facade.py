"""The compiled model as a Hugging Face model: Trainer, TRL and `generate` take it as one.

The mixin stands before the model's own class, so `isinstance`, `config`, `generate` and the
signature of `forward` stay. What transformers asks of a model with adapters is answered here.
"""

import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lora_fx.adapters import storage
from lora_fx.adapters.peft.write import folder_config
from lora_fx.adapters.routing import carry
from lora_fx.adapters.weights import copies, merged
from lora_fx.adapters.weights.changed_weight import rebase_by_name
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.runtime.auxiliary_loss import with_auxiliary_loss
from lora_fx.runtime.methods.slots import SlotMethods
from lora_fx.runtime.routing.call import run_routed
from lora_fx.spec.together import together

if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object


_CHECKPOINT = partial(checkpoint, use_reentrant=False)
_OF_FILES = (  # what else transformers, Trainer and Accelerate give `save_pretrained`
    *("push_to_hub", "repo_id", "max_shard_size", "variant", "token", "safe_serialization"),
    *("save_peft_format", "save_original_format", "distributed_checkpoint", "save_function"),
    *("commit_message", "commit_description", "private", "revision", "create_pr", "tags"),
)


class HuggingFace(SlotMethods, _Base):  # type: ignore[override]
    """Mixin for a compiled `PreTrainedModel`."""

    _hf_peft_config_loaded = True
    lora_fx_checkpoint: str
    lora_fx_recomputes: bool = False
    lora_fx_reentrant: bool = False

    @property
    def peft_config(self) -> dict[str, dict[str, Any]]:  # type: ignore[override]
        """The adapters as `LoraConfig` fields, for loggers."""
        plans = self.lora_fx_adapters
        return {name: folder_config(self, plan, self._layers()) for name, plan in plans.items()}

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        selected_adapters: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write every adapter as a PEFT folder, see `save_adapters`; the base is not written.

        With `selected_adapters` their folders alone; others, and the spec, stay as they are. Of
        what transformers' method takes, what is about the base's files does nothing. Raises
        LoraFxError for unknown adapters, TypeError for other keywords.

        In a `Trainer` checkpoint (`checkpoint-N`) also a `model.safetensors` with the adapters'
        parameters under their names in this model, which is what `Trainer` resumes from.
        """
        unknown = [name for name in kwargs if name not in _OF_FILES]
        if unknown:
            raise TypeError(f"save_pretrained() got an unexpected keyword argument '{unknown[0]}'")
        self._require_known(tuple(selected_adapters or ()))
        if not is_main_process:
            return
        push, upload = kwargs.get("push_to_hub"), kwargs.get("repo_id") or Path(save_directory).name
        with together(Path(save_directory)) as beside:
            folder = Path(save_directory)
            self._write_adapters(beside, folder, save_embedding_layers, selected_adapters)
            if re.fullmatch(r"checkpoint-\d+", Path(save_directory).name):
                save_file(self._adapter_state(), beside / "model.safetensors", {"format": "pt"})
        if push:
            self.push_to_hub(str(upload))  # type: ignore[arg-type]

    def get_adapter_state_dict(  # type: ignore[override]
        self, adapter_name: str | None = None
    ) -> dict[str, Tensor]:
        """Return an adapter's tensors, or the first active one's, under PEFT's names in a file."""
        name = adapter_name or self.lora_fx_active[0]
        self._require_known((name,))
        return self._own_tensors(name)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the adapters of a compiled model come from its spec or from a folder."""
        message = "adapters are not added to a compiled model by a `PeftConfig`"
        help = "write another `adapter` into the spec, or call `load_adapter`"
        raise LoraFxError((Diagnostic("add-adapter", message, help=help),))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load by name; a file of all adapters and nothing else is complete.

        Where an adapter changed the base's weight, it is now what the adapter in the file left.
        """
        of_adapters = state_dict.keys() == self._adapter_state().keys()
        if of_adapters:
            rebase_by_name(self, state_dict)
            self._activate()
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if of_adapters:
            result.missing_keys.clear()
        return result

    def enable_input_require_grads(self) -> None:
        """Do nothing unless checkpointing is re-entrant, the one mode that needs it.

        A hook that marks the embeddings' output breaks graph capture of the whole model.
        """
        if self.lora_fx_reentrant:
            super().enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads` where it did something."""
        if getattr(self, "_require_grads_hooks", None):
            super().disable_input_require_grads()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; `adapter_names` gives each sample its own adapter.

        While its layers are recomputed in backward there is no cache to fill. In training its loss
        has in it what variants add to it: `auxiliary_loss`.
        """
        if self.training and self.lora_fx_recomputes and _takes_use_cache(type(self)):
            kwargs["use_cache"] = False
        result, present = run_routed(self, super().forward, args, kwargs)
        trains = self.training and torch.is_grad_enabled()
        extra = self.auxiliary_loss(present) if trains else None
        return result if extra is None else with_auxiliary_loss(self, result, extra, kwargs)

    def _set_gradient_checkpointing(  # type: ignore[override]
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = _CHECKPOINT,
        **kwargs: Any,
    ) -> None:
        """Every way to switch activation checkpointing on or off comes through here."""
        if self.lora_fx_checkpoint != "none":
            message = f"`checkpoint = {self.lora_fx_checkpoint}` in the spec is in force already"
            warnings.warn(message, stacklevel=2)
            return
        settings = dict(getattr(gradient_checkpointing_func, "keywords", {}))
        if settings.get("use_reentrant") and self.lora_fx_plan.spec.compile.unit == "model":
            message = "`unit = model` recomputes inside its one graph, which is never re-entrant"
            warnings.warn(message, stacklevel=2)
            settings["use_reentrant"] = False
            gradient_checkpointing_func = partial(gradient_checkpointing_func.func, **settings)
        self.lora_fx_recomputes = enable
        self.lora_fx_reentrant = enable and bool(settings.get("use_reentrant"))
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for module in self.modules():
            carry(module, self.lora_fx_routing)

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """`generate` does not compile what is compiled."""
        return False

    def _adapter_state(self) -> dict[str, Tensor]:
        """Return everything that adapters own, each tensor once, by its name in this model.

        What is in slots is not trained, and may be another adapter when it is loaded again.
        """
        found: dict[int, tuple[str, Tensor]] = {}
        slots = () if self.lora_fx_slots is None else self.lora_fx_slots.names
        for fqn, module in self.named_modules():
            kept = copies.is_of_base(fqn) or merged.is_merged(fqn)
            kept = kept or storage.owner_of(f"{fqn}.") in slots
            if storage.is_of_adapters(fqn) and not kept:
                own = module.state_dict(prefix=f"{fqn}.") if not module._modules else {}
                for name, tensor in own.items():
                    found.setdefault(tensor.data_ptr(), (name, tensor))
        return dict(found.values())


@lru_cache
def _takes_use_cache(cls: type) -> bool:
    return "use_cache" in inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
