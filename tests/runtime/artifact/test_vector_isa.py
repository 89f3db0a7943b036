"""What a process knows of vector instructions without having tried them."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch._inductor.cpu_vec_isa import VecISA

TRIED = """
from torch._inductor.cpu_vec_isa import valid_vec_isa_list
print([str(isa) for isa in valid_vec_isa_list()])
"""
ACCEPTED = """
from pathlib import Path
from torch._inductor.cpu_vec_isa import VecISA, valid_vec_isa_list
from lora_fx.runtime.artifact.vector_isa import accept_loaded

tried = []
VecISA._probe_load = lambda isa, library: tried.append(library) or False
libraries = sorted(Path({folder!r}).rglob("*.so"))
accept_loaded(set(libraries))
print(([str(isa) for isa in valid_vec_isa_list()], tried))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(VecISA, "_probe_load"), reason="torch tries them in another way")
def test_libraries_that_are_there_are_not_tried_again(tmp_path: Path) -> None:
    isas = _printed(TRIED, tmp_path)
    assert isas
    assert _printed(ACCEPTED.format(folder=str(tmp_path)), tmp_path) == (isas, [])
    some = next(tmp_path.rglob("*.so"))
    none, tried = _printed(ACCEPTED.format(folder=str(some.parent)), tmp_path)
    assert tried
    assert len(none) < len(isas)


def _printed(script: str, kept: Path) -> object:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(kept)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return ast.literal_eval(done.stdout)
