"""What can be set of an adapter, to which values, and what holds where nothing is set."""

from lora_fx.spec.expressions import Value, Word
from lora_fx.spec.rule import (
    Rule,
    Rules,
    at_least_zero,
    list_of,
    number,
    positive,
    share,
    text,
    truth,
    whole,
    words,
)

DTYPES = ("float32", "bfloat16", "float16")


def _from_one(value: Value) -> bool:
    return number(value) and value >= 1  # type: ignore[operator]


def _token(value: Value) -> bool:
    return type(value) is int and value >= 0


def _name(value: Value) -> bool:
    return isinstance(value, str) and bool(value)


def adapter_names() -> Rule:
    """Accept lists of names of adapters, each a text."""
    return list_of("names of adapters in quotes", _name)


_EVA: Rules = {
    "rho": Rule("a number of at least 1", 2.0, _from_one),
    "tau": share(0.99),
    "use_label_mask": truth(True),
    "label_mask_value": Rule("a whole number", -100, lambda value: type(value) is int),
    "whiten": truth(False),
    "adjust_scaling_factors": truth(True),
}
_CORDA: Rules = {
    "method": words(("ipm", "kpm"), "ipm"),
    "use_float16_for_covariance": truth(False),
}
_LORA_GA: Rules = {
    "direction": words(("ArB2r", "ArBr", "A2rBr", "random"), "ArB2r"),
    "scale": words(("stable", "weight_svd", "gd_scale", "unit"), "stable"),
    "stable_gamma": positive(16),
}
_LOFTQ: Rules = {
    "bits": Rule("4 or 8", 4, lambda value: value in (4, 8) and type(value) is int),
    "iterations": whole(1, 1),
}
INITS = {
    "default": {},
    "gaussian": {},
    "random": {},
    "pissa": {"iterations": whole(1)},
    "olora": {},
    "loftq": _LOFTQ,
    "orthogonal": {},
    "mica": {},
    "eva": _EVA,
    "corda": _CORDA,
    "lora_ga": _LORA_GA,
}

_VELORA: Rules = {
    "num_groups": whole(1, 64),
    "scale": positive(1.0),
    "init_type": words(("batch_average", "batch_average_once", "random"), "batch_average"),
}
_MONTECLORA: Rules = {
    "num_samples": whole(1, 8),
    "use_entropy": truth(False),
    "dirichlet_prior": positive(0.1),
    "sample_scaler": at_least_zero(1e-4),
    "kl_loss_weight": at_least_zero(1e-5),
    "buffer_size": whole(1, 150),
}
_BDLORA: Rules = {
    "a": list_of("texts", _name),
    "b": list_of("texts", _name),
    "blocks": whole(1, 1),
    "strict": truth(True),
}
VARIANTS = {
    "lora": {},
    "dora": {},
    "alora": {"tokens": list_of("token ids", _token, required=True)},
    "velora": _VELORA,
    "kasa": {"beta": at_least_zero(1e-4), "gamma": at_least_zero(1e-3)},
    "bdlora": _BDLORA,
    "monteclora": _MONTECLORA,
}

ADAPTER: Rules = {
    "rank": whole(1, 8),
    "alpha": Rule("a finite number", 8, number, json={"type": "number"}),
    "scaling": Rule(
        "`standard`, `rslora` or a number",
        Word("standard"),
        number,
        {"standard": {}, "rslora": {}},
        json={"type": "number"},
    ),
    "dropout": share(0),
    "init": words(INITS, "default"),
    "variant": words(VARIANTS, "lora"),
    "bias": words(("none", "all", "lora_only"), "none"),
    "lora_bias": truth(False),
    "seed": whole(0, 0),
    "dtype": words(DTYPES, "float32"),
    "compute": words(("activation", *DTYPES), "activation"),
    "weights": text(),
    "doubled_out_proj": truth(False),
    "tie": truth(False),
    "offload": truth(False),
    "trainable": truth(True),
}
OF_THE_WHOLE_ADAPTER = ("weights", "doubled_out_proj", "bias")
