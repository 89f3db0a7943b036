"""Where an expression stands, and which names and words have a meaning there."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_fx.spec.attributes import ADAPTER
from lora_fx.spec.blocks import COMPILE, ENTRY, LAYERS, MERGE, MODEL, OPTIMIZER, QUANTIZE, ROUTE
from lora_fx.spec.rule import Rules

_LAYER = ("layer.index", "layer.count")
_MODULE = ("module.name", "module.in_features", "module.out_features", "module.class")
CONFIG = "model.config"
_CHECK = ("trainable", "trainable_parameters", "sites", "memory", "layer.count")
EVERYWHERE = (*_LAYER, *_MODULE, CONFIG, *ADAPTER, *_CHECK)


def words_of(*tables: Rules) -> dict[str, bool]:
    """Return every bare word that is a value somewhere in these tables.

    True for those that may have arguments.
    """
    found: dict[str, bool] = {}
    for rule in (rule for table in tables for rule in table.values()):
        for word, parameters in rule.words.items():
            found[word] = bool(parameters) or found.get(word, False)
            found = words_of(parameters) | found
    return found


@dataclass(frozen=True)
class Scope:
    """A place for expressions: the dotted names and the bare words that have a meaning there."""

    place: str
    names: tuple[str, ...] = ()
    words: Mapping[str, bool] = field(default_factory=dict)


CONSTANT = Scope(
    "a constant",
    words=words_of(ADAPTER, MODEL, LAYERS, QUANTIZE, ROUTE, MERGE, OPTIMIZER, COMPILE),
)
ATTRIBUTE = Scope("an attribute", (*_LAYER, *_MODULE, CONFIG, *ADAPTER), words_of(ADAPTER))
WHERE = Scope("`where`", (*_LAYER, *_MODULE, CONFIG))
CHECK = Scope("`check`", (*_CHECK, CONFIG))
WEIGHT = Scope("a weight")
TOKENS = Scope("`tokens`")


def block_scope(place: str, table: Rules) -> Scope:
    """Return the scope of a block's attributes, which know no module."""
    return Scope(place, words=words_of(table))


MODEL_BLOCK = block_scope("`model`", MODEL)
LAYERS_BLOCK = block_scope("`layers`", LAYERS)
QUANTIZE_BLOCK = block_scope("`quantize`", QUANTIZE)
ROUTE_BLOCK = block_scope("`route`", ROUTE)
MERGE_BLOCK = block_scope("`merge`", MERGE)
OPTIMIZER_BLOCK = block_scope("`optimizer`", OPTIMIZER)
COMPILE_BLOCK = block_scope("`compile`", COMPILE)
ENTRY_BLOCK = block_scope("`entry`", ENTRY)
