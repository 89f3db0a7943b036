"""Adapters of a compiled model made into others, one at a time."""

from lora_fx.adapters.combine.convert import Adjust, converted
from lora_fx.adapters.combine.intruders import reduced
from lora_fx.adapters.combine.low_rank import Rank, is_rank
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.runtime.methods.checks import check_name
from lora_fx.runtime.methods.combine import CombineMethods


class ConvertMethods(CombineMethods):
    """Mixin for the root of a compiled model."""

    def convert_adapter(self, adapter_name: str, new_name: str, rank: Rank) -> dict[str, float]:
        """Add what an adapter of any kind does as plain LoRA of a rank; return each site's error.

        At each site it is the best B A of that rank to what the adapter changes of the weight, with
        the scaling 1; a `rank` between 0 and 1 is the share of Σ σ² that is kept. The error is
        ‖Δ − B A‖ / ‖Δ‖: rounding, where the rank suffices. Biases, copies and rows are the
        adapter's. The new one is neither active nor trained. Raises LoraFxError, with nothing
        changed, for names, ranks and adapters with which that cannot be.
        """
        if not is_rank(rank):
            message = f"`{rank}` is no rank; it is a whole number from 1, or a share up to 1.0"
            raise LoraFxError((Diagnostic("cannot-convert", message),))
        return self._add_converted(adapter_name, new_name, rank, None)

    def reduce_intruder_dimensions(
        self,
        adapter_name: str,
        new_name: str = "intruder_reduced",
        top_k: int = 10,
        threshold_epsilon: float = 0.5,
        mitigation_lambda: float = 0.75,
    ) -> dict[str, int]:
        """Add an adapter whose new directions are smaller; return how many each site had.

        Of the first `top_k` directions of an adapted weight those intrude that are like none of the
        base's (|cosine| below `threshold_epsilon`); `mitigation_lambda` of each is left. The new
        adapter is plain LoRA of the old one's ranks, neither active nor trained (PEFT activates
        it). Raises LoraFxError, with nothing changed.
        """
        found: list[int] = []

        def adjust(W, delta):
            change, count = reduced(W, delta, top_k, threshold_epsilon, mitigation_lambda)
            found.append(count)
            return change

        errors = self._add_converted(adapter_name, new_name, None, adjust)
        return dict(zip(errors, found, strict=True))

    def _add_converted(
        self, adapter_name: str, new_name: str, rank: Rank | None, adjust: Adjust | None
    ) -> dict[str, float]:
        self._require_known((adapter_name,))
        check_name(new_name)
        if new_name in self.lora_fx_adapters:
            message = f"there is an adapter `{new_name}` already"
            help = f'call `delete_adapter("{new_name}")` first, or choose another name'
            raise LoraFxError((Diagnostic("adapter-exists", message, help=help),))
        plan = self.lora_fx_adapters[adapter_name]
        new, errors = converted(self, plan, new_name, rank, adjust)
        self._add(new)
        return errors
