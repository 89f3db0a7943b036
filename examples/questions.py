"""Questions with answers about three topics, from the package `chatterbot-corpus` (BSD)."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from download import Wheel, prepared, unpack
from rich.progress import Progress

WHEEL = Wheel(
    "chatterbot-corpus",
    "1.3.3",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    345_706,
)
FILES = {
    "coding": ["coding"],
    "robot": ["ai", "botprofile", "emotion", "food"],  # a machine about itself
    "trivia": ["trivia"],
}
TOPICS = tuple(FILES)
HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Question:
    """A question of a topic, and its answer."""

    topic: str
    text: str
    answer: str


def split() -> tuple[list[Question], list[Question]]:
    """Return questions to train on and held-out ones, by topic; the file is fetched once."""
    folder = prepared("questions", ["questions.json"], make)
    found = [Question(*one) for one in json.loads((folder / "questions.json").read_text())]
    training, held_out = [], []
    for topic in TOPICS:
        own = [question for question in found if question.topic == topic]
        held_out += own[::HELD_OUT_EVERY]
        training += [own[i] for i in range(len(own)) if i % HELD_OUT_EVERY]
    return training, held_out


def make(work: Path, folder: Path, progress: Progress) -> None:
    """Write all questions, each once, as one JSON file."""
    topics = {file: topic for topic, files in FILES.items() for file in files}
    members = [f"chatterbot_corpus/data/english/{file}.yml" for file in topics]
    found: dict[str, tuple[str, str, str]] = {}
    for topic, path in zip(topics.values(), unpack(WHEEL, members, work, progress), strict=True):
        for question, answer, *_ in yaml.safe_load(path.read_text("utf-8"))["conversations"]:
            found.setdefault(str(question), (topic, str(question), str(answer)))
    folder.mkdir()
    (folder / "questions.json").write_text(json.dumps(list(found.values())))
