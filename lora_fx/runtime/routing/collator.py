"""A data collator that hands on which adapter each sample is for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.runtime.routing.call import NAMES


class RoutedCollator:
    """Batches samples with `collate`, and puts the list of their adapters' names beside the rest.

    A sample is a mapping that has, beside what `collate` takes, the name of its adapter under
    `argument`, the keyword of the model's `forward`: a data set per adapter gets a column of one
    name, and `Trainer` takes them concatenated. Raises LoraFxError if a sample has none.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], argument: str = NAMES) -> None:
        self.collate = collate
        self.argument = argument

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """Return the batch, a mapping, with one name for each sample."""
        without = sum(self.argument not in sample for sample in samples)
        if without:
            message = f"{without} of {len(samples)} samples have no `{self.argument}`"
            help = 'give each the name of its adapter, `"__base__"` for none'
            raise LoraFxError((Diagnostic("bad-routing", message, help=help),))
        names = [str(sample[self.argument]) for sample in samples]
        others = [{k: v for k, v in one.items() if k != self.argument} for one in samples]
        batch = self.collate(others)
        batch[self.argument] = names
        return batch
