"""How much memory weights take."""

from torch import nn


def bytes_of(*models: nn.Module) -> int:
    """Return the bytes of all tensors of the models; storage that several share counts once."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
