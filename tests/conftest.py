"""What many tests share: the real models."""

import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from lora_fx.runtime.artifact import trust

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Inductor may load a library that another process is still writing ("file too short").
    own = Path(tempfile.gettempdir(), f"inductor-{getpass.getuser()}-{worker}")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own)


# beside other processes an example takes as long as it takes
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture(scope="session", autouse=True)
def own_trust(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trust nothing but what these tests build, and leave the user's own record alone."""
    own = tmp_path_factory.mktemp("own-cache") / "trusted_artifacts"
    usual = trust._path

    def path() -> Path:
        return usual() if "LORA_FX_CACHE" in os.environ else own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "_path", path)
        yield


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
