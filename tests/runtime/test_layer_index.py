"""Layers share graphs whatever their index, unless they compute with it."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
)
from transformers.cache_utils import DynamicCache

import lora_fx
from tests.dense import relative
from tests.odd_models import Layered
from tests.tiny import graphs, tokens

TARGET = r'regex ".*\.(q_proj|fc1|fc2|in_proj|c_attn|c_fc)"'
SPEC = f"lora 1 adapter default {{ rank = 2 init = random target {TARGET} }}"
TOKENS = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bart(layers: int) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {f"{part}_ffn_dim": 44 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    config = BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=layers, decoder_start_token_id=2,
        **sizes, **TOKENS,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def mamba(layers: int) -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_heads": 8, "head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 4}
    config = Mamba2Config(hidden_size=32, num_hidden_layers=layers, **sizes, **TOKENS)
    return Mamba2ForCausalLM(config).eval()


def gpt2(layers: int) -> GPT2LMHeadModel:
    """Hands its layers the cache by position."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=layers, n_head=4, n_positions=64, **TOKENS)
    return GPT2LMHeadModel(config).eval()


def generated(model: nn.Module, **settings) -> Tensor:
    ids = tokens(2, 7)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6}
    return model.generate(ids, do_sample=False, **given, **settings)


@pytest.mark.parametrize(("build", "count"), [(bart, 4), (mamba, 2), (gpt2, 3)])
def test_generation_takes_as_many_graphs_at_any_depth(build, count: int) -> None:
    for layers in (2, 5):
        base = build(layers)
        model, marked = (lora_fx.compile(base, SPEC, backend=b) for b in ("eager", None))
        before = graphs()
        got = generated(model)
        assert graphs() - before <= count
        assert torch.equal(got, generated(marked))


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_other_caches_of_an_encoder_and_a_decoder(settings: dict) -> None:
    base = bart(2)
    model, marked = (lora_fx.compile(base, SPEC, backend=b) for b in ("eager", None))
    assert torch.equal(generated(model, **settings), generated(marked, **settings))


class Counting(nn.Module):
    """Computes with its index, and reads a cache by it."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.up = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) / (self.layer_idx + 1)


class Hiding(Counting):
    """Hands its index on to a function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) / self._by(self.layer_idx)

    def _by(self, number: int) -> float:
        return number + 1.5


@pytest.mark.parametrize("layer", [Counting, Hiding])
def test_an_index_that_is_computed_with_is_guarded(layer: type) -> None:
    torch.manual_seed(0)
    base = Layered([layer(i) for i in range(4)])
    spec = "lora 1 adapter default { rank = 2 init = random target up }"
    model, marked = (lora_fx.compile(base, spec, backend=b) for b in ("eager", None))
    x = torch.randn(3, 5)
    before = graphs()
    assert relative(model(x), marked(x)) < 1e-6
    assert graphs() - before >= 4


class Remembering(nn.Module):
    """Adds up what its place in a cache has seen."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.up = nn.Linear(5, 5)

    def forward(self, x: Tensor, cache: tuple[DynamicCache]) -> Tensor:
        y = self.up(x)[None, None]
        keys, _ = cache[0].update(y, y, self.layer_idx)
        return keys.sum(2)[0]


class Stacked(Layered):
    """Hands its layers the cache inside a tuple, where no view takes its place."""

    def forward(self, x: Tensor, cache: DynamicCache) -> Tensor:
        for layer in self.layers:
            x = layer(x, (cache,))
        return x


def test_an_index_into_a_whole_cache_is_guarded() -> None:
    torch.manual_seed(0)
    base = Stacked([Remembering(i) for i in range(3)])
    spec = "lora 1 adapter default { rank = 2 init = random target up }"
    model, marked = (lora_fx.compile(base, spec, backend=b) for b in ("eager", None))
    caches = DynamicCache(), DynamicCache()
    for length in (3, 1, 1, 1):
        x = torch.randn(length, 5)
        got, want = (m(x, cache) for m, cache in zip((model, marked), caches, strict=True))
        assert relative(got, want) < 1e-6
        assert [len(c.layers) for c in caches] == [3, 3]
        sizes = ([layer.keys.shape for layer in cache.layers] for cache in caches)
        assert next(sizes) == next(sizes)
