"""Where things lie in an artifact.

    artifact.json        what it is, and the hash of every other file
    spec.lora            the spec in one file; its paths are relative to the artifact
    spec.lora.lock       what its rules matched, on which model
    plan.json
    adapters/NAME/       an adapter as it starts, as a PEFT folder
    graphs/ENTRY/        the text of each graph that an entry runs, at each stage
    cache/               compiled code
      functions/         a graph with its guards, ready to be called
      kernels/           what Inductor keeps in its own cache folder

All but `cache/` is data: JSON, text, safetensors. `cache/` is code, see `trust`.
"""

from pathlib import Path

MANIFEST = "artifact.json"
SPEC = "spec.lora"
LOCK = "spec.lora.lock"
PLAN = "plan.json"
ADAPTERS = "adapters"
GRAPHS = "graphs"
CACHE = "cache"
FUNCTIONS = f"{CACHE}/functions"
KERNELS = f"{CACHE}/kernels"


def is_artifact(folder: Path) -> bool:
    """Whether a folder is an artifact, damaged or not."""
    return (folder / MANIFEST).is_file()


def files_below(folder: Path) -> list[Path]:
    """Return the files below a folder, in the same order everywhere."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
