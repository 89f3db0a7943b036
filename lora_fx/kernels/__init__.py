"""Kernels behind operators of compiled graphs, each with its plain reference."""

from importlib.util import find_spec


def are_on(device: str) -> bool:
    """Whether kernels run on a kind of device, here; elsewhere the references do."""
    return device == "cuda" and find_spec("triton") is not None
