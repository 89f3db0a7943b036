"""The compiled model as a Hugging Face model: Trainer, TRL and `generate` take it as one.

The mixin stands before the model's own class, so `isinstance`, `config`, `generate` and the
signature of `forward` stay. What transformers asks of a model with adapters is answered here.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lora_fx.adapters import storage
from lora_fx.adapters.peft.write import describe
from lora_fx.runtime.adapter_methods import AdapterMethods

if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object


class HuggingFace(AdapterMethods, _Base):
    """Mixin for a compiled `PreTrainedModel`."""

    _hf_peft_config_loaded = True
    lora_fx_checkpoint: str
    lora_fx_recomputes: bool = False
    lora_fx_reentrant: bool = False

    @property
    def peft_config(self) -> dict[str, dict[str, Any]]:
        """The adapters as `LoraConfig` fields, for loggers."""
        modules = list(storage.base_modules(self))
        return {
            name: describe(
                {f: s for f, s in storage.sites(self) if name in s.lora_arithmetic}, name, modules
            )
            for name in self.lora_fx_adapters
        }

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write every adapter as a PEFT folder; the base model is not written.

        In a `Trainer` checkpoint (`checkpoint-N`) also a `model.safetensors` with the adapters'
        parameters under their names in this model, which is what `Trainer` resumes from.
        """
        if not is_main_process:
            return
        self.save_adapters(save_directory)
        if re.fullmatch(r"checkpoint-\d+", Path(save_directory).name):
            save_file(
                self._adapter_state(), Path(save_directory) / "model.safetensors", {"format": "pt"}
            )
        if kwargs.get("push_to_hub"):
            self.push_to_hub(str(kwargs.get("repo_id") or Path(save_directory).name))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load by name. With `strict=False`, a file of all adapters and nothing else is complete."""
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if state_dict.keys() == self._adapter_state().keys():
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
        """Run the model; while its layers are recomputed in backward there is no cache to fill."""
        if self.training and self.lora_fx_recomputes:
            kwargs["use_cache"] = False
        return super().forward(*args, **kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        self.lora_fx_recomputes = enable

    def _activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kw: Any
    ) -> None:
        if self.lora_fx_checkpoint != "none":
            warnings.warn("`checkpoint = layers` in the spec is in force already", stacklevel=2)
            return
        settings = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if settings["use_reentrant"] and self.lora_fx_plan.spec.compile.unit == "model":
            warnings.warn(
                "`unit = model` recomputes inside its one graph, which is never re-entrant",
                stacklevel=2,
            )
            settings["use_reentrant"] = False
        self.lora_fx_reentrant = settings["use_reentrant"]
        super()._activation_checkpointing_enable(settings, *args, **kw)

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """`generate` does not compile what is compiled."""
        return False

    def _adapter_state(self) -> dict[str, Tensor]:
        return {
            f"{fqn}.{name.replace('.weight', '')}.{adapter}.weight": parameter.detach()
            for fqn, site in storage.sites(self)
            for adapter in site.lora_arithmetic
            for name, parameter in storage.tensors(site, adapter).items()
        }
