"""What can be set in the blocks that are about no single module."""

from lora_fx.spec.attributes import ADAPTER, DTYPES, adapter_names
from lora_fx.spec.expressions import Value
from lora_fx.spec.rule import (
    Rule,
    Rules,
    at_least_zero,
    json_text,
    listed,
    positive,
    share,
    text,
    truth,
    whole,
    words,
)

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

MODEL: Rules = {
    "dtype": words(("auto", *DTYPES), None),
    "revision": text(),
    "trust_remote_code": truth(False),
}

LAYERS: Rules = {
    "of": text(),
    "share": words(("weights", "nothing"), "weights"),
}

_FOUR_BIT: Rules = {"double_quant": truth(False), "compute_dtype": words(DTYPES, "float32")}
QUANTIZE: Rules = {
    "method": words(
        {"nf4": _FOUR_BIT, "fp4": _FOUR_BIT, "int8": {"threshold": at_least_zero(6.0)}},
        None,
        required=True,
    ),
    "storage": words(("uint8", *DTYPES), "uint8"),
}

_ARROW: Rules = {"top": whole(1, 3), "temperature": positive(1.0), "general": adapter_names()}
ROUTE: Rules = {
    "by": words({"argument": {"name": text(required=True)}, "arrow": _ARROW}, None),
    "slots": whole(1),
    "max_rank": whole(1),
    "train": truth(False),
}

_DENSITY: Rules = {"density": share(required=True)}
_TIES: Rules = {**_DENSITY, "sign": words(("total", "frequency"), "total")}
_METHODS: dict[str, Rules] = {
    "ties": _TIES,
    "dare_linear": _DENSITY,
    "dare_ties": _TIES,
    "magnitude_prune": _DENSITY,
}
MERGE: Rules = {
    "method": words(
        {
            **{"cat": {}, "svd": {}, "linear": {"cross_terms": truth(False)}},
            **_METHODS,
            **{f"{name}_svd": rules for name, rules in _METHODS.items()},
        },
        "cat",
    ),
    "rank": words({"svd": {"rank": whole(1, required=True)}}, None),
    "into": words({"base": {"dequantize": truth(False)}}, None),
    "save": text(),
    "dtype": words(DTYPES, None),
}


def _moments(value: Value) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in value)
    )


OPTIMIZER: Rules = {
    "name": words(("adamw", "adamw8bit", "paged_adamw8bit", "sgd", "lora_fa"), "adamw"),
    "lr": positive(required=True),
    "loraplus_ratio": positive(),
    "weight_decay": at_least_zero(0.0),
    "embedding_lr": positive(),
    "betas": Rule(
        "a list of two numbers from 0 to below 1",
        None,
        _moments,
        json={
            "type": "array",
            "items": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            "minItems": 2,
            "maxItems": 2,
        },
    ),
    "eps": positive(),
    "momentum": share(),
}

COMPILE: Rules = {
    "mode": Rule(
        listed([f'`"{mode}"`' for mode in _MODES]),
        "default",
        lambda value: isinstance(value, str) and value in _MODES,
        json=json_text({"enum": [*_MODES]}),
    ),
    "dynamic": truth(),
    "unit": words(("layers", "model"), "layers"),
    "checkpoint": words(
        {"none": {}, "layers": {}, "budget": {"share": share(required=True)}}, "none"
    ),
    "layout": words(("auto", "plain", "augmented"), "auto"),
}
ENTRIES = ("train", "forward", "generate")
ENTRY: Rules = {"batch": whole(1, required=True), "sequence": whole(1, required=True)}

BLOCKS = {
    "adapter": ADAPTER,
    "model": MODEL,
    "layers": LAYERS,
    "quantize": QUANTIZE,
    "route": ROUTE,
    "merge": MERGE,
    "optimizer": OPTIMIZER,
    "compile": COMPILE,
    "entry": ENTRY,
}
