"""What many tests share: the real models."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return a checkpoint folder of SmolLM2-135M-Instruct; only for tests marked `real`."""
    from prepare_smollm2 import prepare

    return prepare()


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Return a checkpoint folder of all-MiniLM-L6-v2; only for tests marked `real`."""
    from prepare_minilm import prepare

    return prepare()
