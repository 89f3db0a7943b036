from pydoc_data.topics import topics

import pytest
from python_docs import HELD_OUT_EVERY, Blocks, split
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for text in topics.values() for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<end>", *words])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>")


def test_blocks_are_the_text_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    name = sorted(topics)[0]
    blocks = Blocks([topics[name]], tokenizer, length=11)
    words = tokenizer.convert_ids_to_tokens(blocks.tokens_NT.flatten().tolist())
    assert len(blocks) == (len(topics[name].split()) + 1) // 11
    assert words == topics[name].split()[: len(words)]


def test_labels_are_the_inputs(tokenizer: PreTrainedTokenizerFast) -> None:
    training, _ = split(tokenizer, length=13)
    assert training[3]["input_ids"].equal(training[3]["labels"])
    assert not training[3]["input_ids"].equal(training[4]["input_ids"])


def test_no_topic_is_both_trained_on_and_held_out(tokenizer: PreTrainedTokenizerFast) -> None:
    training, held_out = split(tokenizer, length=7)
    kept = {tuple(block.tolist()) for block in training.tokens_NT}
    seen = sum(tuple(block.tolist()) in kept for block in held_out.tokens_NT)
    assert seen < len(held_out) / 100
    assert len(held_out) > len(training) / (4 * HELD_OUT_EVERY)
