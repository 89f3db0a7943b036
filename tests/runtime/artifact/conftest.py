from pathlib import Path

import pytest

from tests.runtime.artifact.made import build, one_program_each, text


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a Llama of two layers with `entry forward`; only to be looked at."""
    out = tmp_path_factory.mktemp("artifacts") / "forward"
    with pytest.MonkeyPatch.context() as patch:
        one_program_each(patch)
        build(out, text())
    return out
