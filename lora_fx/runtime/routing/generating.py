"""`generate` with an adapter for each sample."""

from typing import Any

from lora_fx.runtime.facade import HuggingFace
from lora_fx.runtime.routing.call import INDICES, route_call


class Generating(HuggingFace):
    """Mixin for a compiled `PreTrainedModel` that generates."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; `adapter_names` gives each sample its own adapter."""
        return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does; `adapter_names` gives each sample of the batch its adapter.

        All beams and all returned sequences of a sample have its adapter. An encoder runs before
        there are several of them, and is routed as the call is.
        """
        call = route_call(self, args, kwargs)
        if call.rows is not None:
            where = call.rows if call.shares is None else call.shares
            kwargs[INDICES] = call.rows.to(where.device)
        with self.lora_fx_routing.of(call.shares):
            return super().generate(*args, **kwargs)  # type: ignore[misc]
