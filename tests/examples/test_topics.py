from pathlib import Path

import pytest
import topics
from peft import PeftModel
from questions import TOPICS, split
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.real


def test_no_question_is_in_both_parts() -> None:
    training, held_out = split()
    texts = [{question.text for question in part} for part in (training, held_out)]
    assert len(texts[0]) > 4 * len(texts[1]) > 160
    assert not texts[0] & texts[1]
    assert {question.topic for question in held_out} == set(TOPICS)


def test_only_answers_are_learnt(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    _, held_out = split()
    sample = topics.Samples(held_out, tokenizer)[1]
    learnt = [token for token in sample["labels"] if token != -100]
    assert tokenizer.decode(learnt).startswith(held_out[1].answer.split()[0])
    assert held_out[1].text not in tokenizer.decode(learnt)
    assert held_out[1].text in tokenizer.decode(sample["input_ids"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # by Inductor
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing")  # by PEFT
def test_the_whole_job(smollm2: Path, tmp_path: Path) -> None:
    outcome = topics.main(steps=10, held_out_each=6, out=tmp_path)
    for topic in TOPICS:
        of_topic = {name: loss for (of, name), loss in outcome.losses.items() if of == topic}
        assert of_topic[topic] < of_topic[topics.BASE] - 0.1, topic
    assert any(by_base != own for _, by_base, own in outcome.answers)
    folders = {topic: tmp_path / "adapters" / topic for topic in TOPICS}
    base = AutoModelForCausalLM.from_pretrained(smollm2)
    peft = PeftModel.from_pretrained(base, folders.pop("coding"), "coding")
    for topic, folder in folders.items():
        peft.load_adapter(folder, topic)
    assert peft.peft_config["trivia"].r == 4
