"""A convolution as a site."""

from typing import Any

from torch import Tensor

from lora_fx.adapters.sites.site import Site
from lora_fx.diagnostics import Diagnostic, LoraFxError


class ConvolutionSite(Site):
    """Mixin for a convolution: announced where the weight meets the input.

    A subclass of it that prepares its input first, and then convolves, is adapted there. One that
    convolves with another weight is not, which `runtime/uncalled.py` refuses.
    """

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base module."""
        return super(Site, self).forward(input, *args, **kwargs)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shares = None if self.lora_routing is None else self.lora_routing.shares
        if shares is not None and len(shares) > 1 and input.dim() < weight.dim():
            message = "a convolution gets one sample without a batch, of a batch of several"
            help = "give the model batches of one sample each"
            raise LoraFxError((Diagnostic("rows-not-samples", message, help=help),))
        output = super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        return self._announced(output, input, None) if weight is self.weight else output
