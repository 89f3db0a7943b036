"""`generate` with an adapter for each sample."""

from functools import partial
from typing import Any

import torch

from lora_fx.runtime.facade import HuggingFace
from lora_fx.runtime.routing.call import INDICES, adapters_in, route_call
from lora_fx.runtime.routing.invocation import STARTS, in_prompt


class Generating(HuggingFace):
    """Mixin for a compiled `PreTrainedModel` that generates."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; `adapter_names` gives each sample its own adapter."""
        return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does; `adapter_names` gives each sample of the batch its adapter.

        All beams and all returned sequences of a sample have its adapter. An encoder runs before
        there are several of them, and is routed as the call is. An adapter that acts from its
        invocation on is invoked by the prompt: what is written later does not invoke it. This is no
        step of training, also of a model that is: adapters are brought into slots, and what the
        spec says of training does not matter.
        """
        with torch.no_grad():
            call = route_call(self, args, kwargs)
        if call.rows is not None:
            where = call.shares if isinstance(call.shares, torch.Tensor) else call.rows
            kwargs[INDICES] = call.rows.to(where.device)
        there = partial(adapters_in, self, call)
        starts = in_prompt(self, call.shares is not None, there, args, kwargs)
        if starts is not None:
            kwargs[STARTS] = starts
        with self.lora_fx_routing.of(call.shares):
            return super().generate(*args, **kwargs)  # type: ignore[misc]
