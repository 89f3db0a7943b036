"""`doubled_out_proj`: weights that PEFT trained on `nn.MultiheadAttention`.

PEFT, 0.21 at least, adds s B A to the output projection twice, where it is merged as where it is
not. What it trained there is an adapter of twice the B.
"""

from collections.abc import Iterable, Iterator

from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.evaluate import evaluate, no_environment
from lora_fx.spec.spec import AdapterSpec

NAME = "doubled_out_proj"


def is_doubled(adapter: AdapterSpec) -> bool:
    """Whether an adapter's weights are such."""
    setting = adapter.settings.get(NAME)
    return setting is not None and evaluate(setting.value, no_environment) is True


def doubled_faults(adapter: AdapterSpec, sites: Iterable[SitePlan]) -> Iterator[Diagnostic]:
    """Refuse to double what was not trained by PEFT, or is no attention."""
    if not is_doubled(adapter):
        return
    message, span = None, adapter.settings[NAME].span
    if "weights" not in adapter.settings:
        message = f"`{NAME}` is about weights that PEFT has trained"
    elif not any(site.layer.kind == "attention" for site in sites):
        message = f"`{NAME}` is about `nn.MultiheadAttention`, and `{adapter.name}` adapts none"
    if message is not None:
        yield Diagnostic("cannot-apply", message, span, help="leave it out")
