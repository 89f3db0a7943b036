"""Which vector instructions Inductor may use, known without trying each again.

Inductor compiles a small library for each kind and loads it in a process of its own, in every
process that uses it. An artifact holds these libraries, and its key the processor's flags.

Relies on `VecISA._probe_load` (where torch has none, each is tried as always) and
`valid_vec_isa_list` of `torch._inductor.cpu_vec_isa`; `tests/runtime/artifact/test_vector_isa.py`
holds what is used of them.
"""

from collections.abc import Collection
from pathlib import Path
from unittest.mock import patch


def accept_loaded(libraries: Collection[Path]) -> None:
    """Let torch list its kinds of vector instructions, of which these libraries need no trial."""
    from torch._inductor.cpu_vec_isa import VecISA, valid_vec_isa_list

    try_it = getattr(VecISA, "_probe_load", None)
    if try_it is None or not libraries:
        return

    def is_accepted(isa: VecISA, library: str) -> bool:
        return Path(library) in libraries or try_it(isa, library)

    with patch.object(VecISA, "_probe_load", is_accepted):
        valid_vec_isa_list()
