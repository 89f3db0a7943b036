"""Room beside a weight: rows of W that lie apart, so that columns of another matrix fit between.

    memory   [ W | room ]     W: (out, in), with strides (in + ROOM, 1)

A weight shows by its strides that it has room. Whatever copies it without looking, and so packs the
rows, makes an ordinary weight of it, and what is compiled from then on treats it as one.
"""

from torch import Tensor

ROOM = 64  # columns: GEMMs run at full speed on inner dimensions that are a multiple of it


def has_room(weight: Tensor) -> bool:
    """Whether a (fake) matrix has room beside it."""
    return weight.dim() == 2 and weight.stride() == (weight.shape[1] + ROOM, 1)


def owns_room(weight: Tensor) -> bool:
    """Whether the storage of a weight with such strides is the weight and its room."""
    elements = weight.shape[0] * (weight.shape[1] + ROOM)
    whole = weight.untyped_storage().nbytes() == elements * weight.element_size()
    return has_room(weight) and weight.storage_offset() == 0 and whole


def with_room(weight: Tensor) -> Tensor:
    """Return a copy of a matrix (out, in) with room beside it, which is zero."""
    rows, columns = weight.shape
    return weight.new_zeros((rows, columns + ROOM))[:, :columns].copy_(weight)


def room_of(weight: Tensor) -> Tensor:
    """Return the room beside a weight: a view of (out, ROOM) that autograd does not see."""
    data = weight.data
    shape = (weight.shape[0], ROOM)
    return data.as_strided(shape, data.stride(), data.storage_offset() + weight.shape[1])
