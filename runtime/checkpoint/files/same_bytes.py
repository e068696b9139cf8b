"""Whether two tensors that files store are one and the same, read side by side in bounded memory."""

from __future__ import annotations

from runtime.checkpoint.files.reading import open_descriptor, read_exactly
from runtime.checkpoint.files.safetensors import StoredTensor

__all__ = ["has_same_bytes"]

_PART = 2**20


def has_same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two stored tensors are equal bit for bit, dtype and shape included.

    Raises:
        IncompleteError: a file ends before its tensor does.
        CheckpointError: a file cannot be read.
    """
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    parts = bytearray(min(_PART, first.size)), bytearray(min(_PART, first.size))
    with open_descriptor(first.file) as one, open_descriptor(second.file) as other:
        for start in range(0, first.size, _PART):
            for descriptor, tensor, part in ((one, first, parts[0]), (other, second, parts[1])):
                wanted = memoryview(part)[: tensor.size - start]
                read_exactly(descriptor, wanted, tensor.offset + start, tensor.file)
            # Behind a last part that is short lies what was read before, and was the same.
            if parts[0] != parts[1]:
                return False
    return True
