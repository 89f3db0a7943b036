from pathlib import Path

import pytest

from tests.runtime.artifact.made import build, one_program_each, text


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust nothing but what these tests build, and leave the user's cache alone."""
    monkeypatch.setenv("LORA_FX_CACHE", str(tmp_path_factory.getbasetemp() / "own-cache"))


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a Llama of two layers with `entry forward`; only to be looked at."""
    out = tmp_path_factory.mktemp("artifacts") / "forward"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FX_CACHE", str(tmp_path_factory.getbasetemp() / "own-cache"))
        one_program_each(patch)
        build(out, text())
    return out
