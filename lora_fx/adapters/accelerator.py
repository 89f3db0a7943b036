"""`offload = true`: weights stay on the CPU, and what an adapter starts as is computed elsewhere.

Only what one site needs is on the accelerator at a time, and nothing of it stays there.
"""

import torch

from lora_fx.plan.sites import SitePlan

_SHARES_MEMORY = ("cpu", "mps")  # of Apple's nothing is gained, and it has no float64


def start_device(site: SitePlan, device: torch.device) -> torch.device:
    """Return where to compute how an adapter starts on a weight that lies on a device.

    That is there, but for `offload` and a weight on the CPU: on the accelerator, if there is one.
    """
    if not site.offload or device.type != "cpu" or not torch.accelerator.is_available():
        return device
    found = torch.accelerator.current_accelerator()
    return device if found is None or found.type in _SHARES_MEMORY else found
