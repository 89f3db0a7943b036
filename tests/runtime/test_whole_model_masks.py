"""What attention is told of its mask in a whole model's graph, beside what transformers tells it.

The marked model runs eagerly: there transformers looks at the values of masks and positions itself.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
)

import lora_fx
from lora_fx.passes.causal_attention import attention_calls
from lora_fx.rewrite.driver import graph_modules
from tests.tiny import (
    SIZES,
    VOCABULARY,
    assert_differ,
    assert_equal,
    graphs,
    llama,
    mistral,
    spec,
    tokens,
)

LENGTH = 17
MASK, CAUSAL, NOTHING = ("mask", "causal", "nothing")
Inputs = dict[str, Any]


def gemma3(layers: int = 2, **settings: Any) -> Gemma3ForCausalLM:
    """One sliding and one full layer; the window is 8 tokens."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        num_hidden_layers=layers,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        **SIZES | settings,
    )
    return Gemma3ForCausalLM(config)


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(num_hidden_layers=2, **SIZES))


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=44,
            decoder_ffn_dim=44,
            vocab_size=VOCABULARY,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )


def pair(base: PreTrainedModel, more: str = "") -> tuple[nn.Module, nn.Module, list[set[str]]]:
    """The rewritten and the marked model, and for each graph what attention is told in it."""
    text = spec("model").replace("unit", f"{more} unit")
    model = lora_fx.compile(base, text, backend="eager")
    told: list[set[str]] = []
    model.lora_fx_unit.backend.seen = lambda program: told.append(  # type: ignore[union-attr]
        {
            MASK if a.get("attn_mask") is not None else CAUSAL if a["is_causal"] else NOTHING
            for part in graph_modules(program.at("lowered"))
            for _, a in attention_calls(part)
        }
    )
    return model.eval(), lora_fx.compile(base, text, backend=None).eval(), told


def padded(*hidden: tuple[int, slice], length: int = LENGTH) -> Tensor:
    mask = torch.ones(3, length, dtype=torch.int64)
    for sample, place in hidden:
        mask[sample, place] = 0
    return mask


def order(length: int = LENGTH, *restarts: int) -> Tensor:
    ends = [*restarts, length]
    parts = [torch.arange(end - start) for start, end in zip([0, *restarts], ends, strict=False)]
    return torch.cat(parts).expand(3, -1)


def four_dimensional() -> Tensor:
    """Each token sees itself and the four before it."""
    back = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return ((back >= 0) & (back < 5)).expand(3, 1, -1, -1)


ONES = padded()
RIGHT = padded((0, slice(-4, None)), (2, slice(-1, None)))
LEFT = padded((1, slice(None, 6)))
SHORT = {"input_ids": tokens(3, 8), "attention_mask": padded(length=8)}
NO_CACHE = {"use_cache": False}

CASES: dict[str, tuple[Callable[[], PreTrainedModel], Inputs, set[str]]] = {
    "nothing given": (llama, {}, {CAUSAL}),
    "no cache": (llama, NO_CACHE, {CAUSAL}),
    "ones": (llama, {"attention_mask": ONES}, {CAUSAL}),
    "boolean ones": (llama, {"attention_mask": ONES.bool()}, {CAUSAL}),
    "ones, no cache": (llama, {"attention_mask": ONES, **NO_CACHE}, {CAUSAL}),
    "padded on the right": (llama, {"attention_mask": RIGHT}, {MASK}),
    "padded on the left": (llama, {"attention_mask": LEFT}, {MASK}),
    "packed": (llama, {"position_ids": order(LENGTH, 5, 11), **NO_CACHE}, {MASK}),
    "positions in order": (llama, {"position_ids": order(), **NO_CACHE}, {CAUSAL}),
    "one sample's positions": (llama, {"position_ids": order()[:1], **NO_CACHE}, {CAUSAL}),
    "positions from three": (llama, {"position_ids": order() + 3, **NO_CACHE}, {MASK}),
    "restarted, of one mask": (
        llama,
        {"position_ids": order(LENGTH, 5, 11), "attention_mask": ONES, **NO_CACHE},
        {CAUSAL},
    ),
    "a mask for each query": (llama, {"attention_mask": four_dimensional()}, {MASK}),
    "both directions": (lambda: llama(is_causal=False), {"attention_mask": ONES}, {NOTHING}),
    "both directions, padded": (lambda: llama(is_causal=False), {"attention_mask": LEFT}, {MASK}),
    "longer than the window": (mistral, {"attention_mask": ONES}, {MASK}),
    "within the window": (mistral, SHORT, {CAUSAL}),
    "within the window, no cache": (mistral, {**SHORT, **NO_CACHE}, {CAUSAL}),
    "some layers with a window": (gemma3, {"attention_mask": ONES}, {MASK, CAUSAL}),
    "all within the window": (gemma3, SHORT, {CAUSAL}),
    "some with a window, padded": (gemma3, {"attention_mask": RIGHT}, {MASK}),
    "some with a window, packed": (
        gemma3,
        {"position_ids": order(LENGTH, 5), **NO_CACHE},
        {MASK},
    ),
    "bidirectional gemma": (
        lambda: gemma3(use_bidirectional_attention=True),
        {"attention_mask": ONES},
        {MASK},
    ),
    "an encoder": (bert, {"attention_mask": ONES}, {NOTHING}),
    "an encoder, padded": (bert, {"attention_mask": RIGHT}, {MASK}),
    "encoder and decoder": (bart, {"attention_mask": ONES, **NO_CACHE}, {NOTHING, CAUSAL}),
    "encoder and decoder, padded": (
        bart,
        {"attention_mask": RIGHT, **NO_CACHE},
        {MASK, CAUSAL},
    ),
}


UNREAD = ("positions from three", "bidirectional gemma")  # masks that hide nothing all the same
WINDOWS = ("longer than the window", "some layers with a window")


def of_queries_that_see(logits: Tensor, inputs: Inputs) -> Tensor:
    """Leave out what is padded on the left: causal attention of nothing is not defined."""
    mask = inputs.get("attention_mask")
    return logits if mask is None or mask.ndim > 2 else logits[mask.cumsum(-1) > 0]


def step(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Logits and the gradients of a loss on them."""
    model.zero_grad()
    inputs = {"input_ids": tokens(3, LENGTH), **inputs}
    logits = model(**inputs).logits
    logits = of_queries_that_see(logits, inputs)
    logits.log_softmax(-1)[..., 3].square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str) -> None:
    build, inputs, want = CASES[name]
    model, marked, told = pair(build())
    assert_equal(step(model, inputs), step(marked, inputs), 1e-5)
    assert told == [want]


@pytest.mark.parametrize(
    "name", [n for n, (*_, told) in CASES.items() if MASK in told and n not in (*UNREAD, *WINDOWS)]
)
def test_the_masks_matter(name: str) -> None:
    """Negative control: a mask that was kept, taken for one of ones, would have been seen."""
    build, inputs, _ = CASES[name]
    _, marked, _ = pair(build())
    plain = inputs | {"attention_mask": torch.ones(3, LENGTH, dtype=torch.int64)}
    ids = {"input_ids": tokens(3, LENGTH)}
    with torch.no_grad():
        both = [marked(**ids | given).logits for given in (inputs, plain)]
    a, b = (of_queries_that_see(logits, inputs) for logits in both)
    assert_differ([a], [b])


@pytest.mark.parametrize("name", WINDOWS)
def test_the_windows_matter(name: str) -> None:
    build, inputs, _ = CASES[name]
    base = build()
    _, marked, _ = pair(base)
    base.config.sliding_window = LENGTH
    _, wide, _ = pair(base)
    ids = {"input_ids": tokens(3, LENGTH)}
    with torch.no_grad():
        assert_differ([wide(**ids | inputs).logits], [marked(**ids | inputs).logits])


def added_graphs(run: Callable[[], Any]) -> int:
    before = graphs()
    run()
    return graphs() - before


def test_padded_and_whole_batches_take_two_graphs() -> None:
    model, marked, told = pair(llama())
    whole, hidden = {"attention_mask": ONES}, {"attention_mask": RIGHT}

    def run(*given: Inputs) -> None:
        for inputs in given:
            assert_equal(step(model, inputs), step(marked, inputs), 1e-5)

    assert added_graphs(lambda: run(whole, hidden)) == 2
    assert added_graphs(lambda: run(hidden, whole, hidden, whole)) == 0
    assert told == [{CAUSAL}, {MASK}]
    for length in (11, 13, 12):  # the first makes the length a symbol
        for mask in (padded(length=length), padded((1, slice(None, 3)), length=length)):
            inputs = {"input_ids": tokens(3, length), "attention_mask": mask}
            expected = 1 if length == 11 else 0
            assert added_graphs(lambda inputs=inputs: run(inputs)) == expected
    assert told == [{CAUSAL}, {MASK}] * 2


def test_lengths_on_both_sides_of_a_window_take_a_graph_each() -> None:
    text = spec("model").replace("unit", "dynamic = true unit")
    model, marked = (lora_fx.compile(mistral(), text, backend=b) for b in ("eager", None))
    for lengths, count in (((5, 8, 7), 1), ((9, 13), 1), ((6, 12), 0)):
        for length in lengths:
            inputs = {"input_ids": tokens(3, length), "attention_mask": padded(length=length)}
            inputs |= NO_CACHE
            with torch.no_grad():
                got = []
                added = added_graphs(lambda i=inputs, g=got: g.append(model(**i).logits))
                assert added == (count if length == lengths[0] else 0)
                assert_equal(
                    {"a": got[0], "b": got[0]}, dict.fromkeys("ab", marked(**inputs).logits)
                )


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("build", [llama, mistral, gemma3])
@pytest.mark.parametrize("hidden", [False, True])
def test_generation(build: Callable[[], PreTrainedModel], cache: str | None, hidden: bool) -> None:
    model, marked, _ = pair(build())
    settings: Inputs = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    settings |= {"pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    settings |= {"cache_implementation": cache} if cache else {}
    masks = (LEFT, ONES) if hidden else (ONES, LEFT)

    def logits(of: nn.Module, mask: Tensor) -> Tensor:
        result = of.generate(tokens(3, LENGTH), attention_mask=mask, **settings)
        return torch.stack(result.logits)

    got: list[Tensor] = []
    count = added_graphs(lambda: got.append(logits(model, masks[0])))
    assert count <= (2 if cache else 3)
    want, other = (logits(marked, mask) for mask in masks)
    assert_equal({"a": got[0], "b": got[0]}, {"a": want, "b": want}, 1e-5)
    assert added_graphs(lambda: logits(model, masks[0])) == 0
    assert_differ([other], [want])


def test_a_mask_may_be_positional() -> None:
    model, marked, told = pair(bert())
    ids = tokens(3, LENGTH)
    for mask, what in ((ONES, NOTHING), (RIGHT, MASK)):
        with torch.no_grad():
            got, want = model(ids, mask).logits, marked(ids, mask).logits
        assert_equal({"a": got, "b": got}, {"a": want, "b": want}, 1e-5)
        assert told[-1] == {what}


def test_recomputed_layers_are_told_too() -> None:
    model, marked, told = pair(llama(3), "checkpoint = layers")
    model.train(), marked.train()
    for mask, what in ((ONES, CAUSAL), (LEFT, MASK)):
        given = {"attention_mask": mask}
        assert_equal(step(model, given), step(marked, given), 1e-5)
        assert told[-1] == {what}


def test_what_is_read_once_a_call_is_not_written_to() -> None:
    model, _, _ = pair(llama())
    mask, positions = ONES.clone(), order().clone()
    with torch.no_grad():
        model(tokens(3, LENGTH), attention_mask=mask, position_ids=positions)
    assert torch.equal(mask, ONES)
    assert torch.equal(positions, order())


def test_compiled_code_calls_the_causal_kernel() -> None:
    """Inductor's code of forward and backward; keys keep their 2 heads."""
    base = llama()
    model, marked = (lora_fx.compile(base, spec("model"), backend=b) for b in ("inductor", None))
    for mask, causal in ((ONES, True), (RIGHT, False)):
        given = {"attention_mask": mask}
        got, codes = run_and_get_code(lambda given=given: step(model, given))
        assert_equal(got, step(marked, given), 1e-5)
        calls = re.findall(r"= torch\.ops\.aten\._scaled_dot_product.*", "\n".join(codes))
        assert len(calls) == 4
        for call in calls:
            assert ("attn_mask" not in call) == causal
            assert ("0.0, True, scale" in call) == causal
        assert ("(3, 2, 17, 8)" in calls[0]) == causal
