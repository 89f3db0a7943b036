"""`modules_to_save` and `trainable_token_indices` as `train` and `tokens` statements."""

from collections.abc import Iterator, Mapping

from lora_fx.spec.expressions import show
from lora_fx.spec.peft.config import PeftConfig
from lora_fx.spec.peft.known import Known
from lora_fx.spec.peft.matching import saved_modules
from lora_fx.spec.peft.patterns import Pattern, folded


def train_statements(config: PeftConfig) -> list[str]:
    """Return the statements for a model that is not known.

    PEFT takes a name for the end of a module's name, wherever it begins.
    """
    patterns = [Pattern("tail", suffix) for suffix in saved_modules(config.values)]
    return _train(patterns, optional=True)


def train_statements_on(known: Known) -> list[str]:
    """Return the statements that train on a model just what PEFT trains there.

    Of the heads that PEFT adds for a task a model has one: the others are left out.
    """
    suffixes = saved_modules(known.config.values)
    given = known.config.get("modules_to_save", [])
    there = [suffix for suffix in suffixes if known.ending(suffix)]
    found = [pattern for suffix in there for pattern in _ending(suffix, known)]
    missing = [s for s in suffixes if s not in there and (s in given or not there)]
    absent = [Pattern("tail", suffix) for suffix in missing]
    return [*_train(found, optional=False), *_train(absent, optional=True)]


def token_statements(config: PeftConfig, known: Known | None) -> list[str]:
    """Return the statements for the rows of embeddings that are trained."""
    wanted = config.get("trainable_token_indices", {})
    if isinstance(wanted, list):
        return [_tokens(wanted)] if wanted else []
    return [
        f"{_tokens(ids)} in {pattern}"
        for name, ids in wanted.items()
        if ids and not (known and _follows(name, wanted, known))
        for pattern in (_ending(name, known) if known else [Pattern("ending", name)])
    ]


def _follows(name: str, wanted: Mapping[str, list[int]], known: Known) -> bool:
    """Whether the rows are those of the input embedding that the named module is tied to."""
    of_embedding = [
        ids for other, ids in wanted.items() if known.model.embedding in known.ending(other)
    ]
    return known.ending(name) <= known.model.tied and wanted[name] in of_embedding


def _train(patterns: list[Pattern], optional: bool) -> list[str]:
    listed = ", ".join(map(str, folded(patterns)))
    return [f"train{'?' * optional} {listed}"] if patterns else []


def _tokens(ids: list[int]) -> str:
    return f"tokens {show(tuple(dict.fromkeys(ids)))}"


def _ending(suffix: str, known: Known) -> tuple[Pattern, ...]:
    """Return patterns for the modules whose names end so, dot or not."""
    wanted = known.ending(suffix)
    for pattern in _candidates(suffix):
        selection = known.model.select(str(pattern))
        if selection is not None and selection.names == wanted:
            return (pattern,)
    names = (name for name in known.model.modules if name in wanted)
    return folded(Pattern("exact", name) for name in names)


def _candidates(suffix: str) -> Iterator[Pattern]:
    yield Pattern("ending", suffix)
    yield Pattern("tail", suffix)
