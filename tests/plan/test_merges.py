"""Which ranks can be merged by which method: as PEFT does it, at each module."""

import peft
import pytest

import lora_fx
from lora_fx.diagnostics import LoraFxError
from lora_fx.spec.blocks import MERGE
from tests.tiny import llama

METHODS = [name for name in MERGE["method"].words]
DENSITY = "(density = 0.5)"


def refused(method: str, ranks: tuple[int, int], targets: tuple[str, str]) -> list[str]:
    arguments = DENSITY if "density" in MERGE["method"].words[method] else ""
    arguments = "(cross_terms = true)" if method == "linear" else arguments
    text = f"""lora 1
    adapter one {{ rank = {ranks[0]}  target {targets[0]} }}
    adapter other {{ rank = {ranks[1]}  target {targets[1]} }}
    merge both {{ from one - 0.5 * other  method = {method}{arguments} }}"""
    try:
        lora_fx.plan(text, llama(1))
    except LoraFxError as error:
        return [diagnostic.code for diagnostic in error.diagnostics]
    return []


def peft_refuses(method: str, ranks: tuple[int, int]) -> bool:
    one, other = (peft.LoraConfig(r=rank, target_modules=["q_proj"]) for rank in ranks)
    model = peft.LoraModel(llama(1), {"one": one, "other": other}, "one")
    model.inject_adapter(model.model, "other")
    arguments = {"density": 0.5} if "density" in MERGE["method"].words[method] else {}
    try:
        model.add_weighted_adapter(
            ["one", "other"], [1.0, 0.5], "both", combination_type=method, **arguments
        )
    except ValueError as error:
        return "same r value" in str(error)
    return False


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [(2, 3), (3, 3)])
def test_as_peft(method: str, ranks: tuple[int, int]) -> None:
    ours = refused(method, ranks, ("q_proj", "q_proj"))
    assert ours == ["cannot-apply"] * peft_refuses(method, ranks)


def test_some_are_refused_and_some_are_not() -> None:
    found = [bool(refused(method, (2, 3), ("q_proj", "q_proj"))) for method in METHODS]
    assert found.count(True) == 5
    assert found.count(False) == len(METHODS) - 5


def test_ranks_at_modules_that_they_do_not_share_may_differ() -> None:
    assert refused("ties", (2, 3), ("q_proj", "v_proj")) == []
    assert refused("ties", (2, 3), ("q_proj, v_proj", "v_proj")) == ["cannot-apply"]
