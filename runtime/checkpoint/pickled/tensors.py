"""Pickled tensors: views of storages in an archive, as `torch.save` describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from plans.errors import CheckpointError
from plans.text import shorten
from runtime.checkpoint.files.reading import is_size
from runtime.checkpoint.files.safetensors import BITS, StoredTensor, tensor_bytes
from runtime.checkpoint.pickled.archive import Archive, BoundedFile, read_archive
from runtime.checkpoint.pickled.pickle import Global, PickledCall, PickledDict, read_pickle
from runtime.models.dtypes import DTYPE_NAMES
from runtime.tensor_map.tensor_map import Shape, StridedBox, TensorMap, row_major

__all__ = [
    "STORAGES",
    "TORCH_DTYPES",
    "ArchivedTensor",
    "TensorView",
    "find_unknown_dtype",
    "locate_tensor",
    "parse_tensor",
    "parse_view",
    "read_archived_tensor",
    "unknown_dtype_error",
]


TORCH_DTYPES: Mapping[str, str] = {str(dtype): name for dtype, name in DTYPE_NAMES.items()}
"""The safetensors name of a dtype by its torch name, such as `torch.float32`."""

STORAGES: Mapping[str, str] = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL", "torch.ComplexFloatStorage": "C64",
}  # fmt: skip
"""The safetensors name of a storage type's dtype; other dtypes are given next to an untyped storage."""

_UNTYPED = "torch.storage.UntypedStorage"
_REBUILD_V2, _REBUILD_V3 = (f"torch._utils._rebuild_tensor_{version}" for version in ("v2", "v3"))
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_ALLOWED = frozenset((*TORCH_DTYPES, *STORAGES, _UNTYPED, _REBUILD_V2, _REBUILD_V3, "collections.OrderedDict"))
_MAX_DIMS = 64


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor as a pickle describes it.

    Args:
        storage: the number of its storage, under which the archive has the bytes.
        dtype: the safetensors name of its dtype.
        count: how many elements the storage has, or how many bytes if it is untyped.
        is_untyped: whether the storage is untyped.
        base: the index of the tensor's first element in the storage.
        shape: the tensor's shape.
        strides: the storage elements per step along each dim.
    """

    storage: str
    dtype: str
    count: int
    is_untyped: bool
    base: int
    shape: Shape
    strides: Shape


@dataclass(frozen=True, slots=True)
class ArchivedTensor:
    """A tensor as an archive stores it.

    Args:
        storage: its elements as a one-dimensional stored tensor.
        shape: the tensor's shape.
        base: the index of its first element in the storage.
        strides: the storage elements per step along each dim, which need not be row-major.
    """

    storage: StoredTensor
    shape: Shape
    base: int
    strides: Shape

    def to_stored(self) -> StoredTensor | None:
        """Return the range of the storage that is the tensor in row-major order, None if its elements lie otherwise."""
        steps = zip(self.shape, self.strides, row_major(self.shape), strict=True)
        if prod(self.shape) and any(size > 1 and stride != expected for size, stride, expected in steps):
            return None
        dtype, size = self.storage.dtype, tensor_bytes(self.storage.dtype, self.shape)
        offset = self.storage.offset + (self.base * BITS[dtype] // 8 if size else 0)
        return StoredTensor(self.storage.file, dtype, self.shape, offset, size)

    def to_map(self, source: str) -> TensorMap:
        """Return the tensor over its storage.

        Args:
            source: the name of the storage.
        """
        origin, steps = (0,) * len(self.shape), (1,) * len(self.shape)
        return TensorMap(self.shape, (StridedBox(origin, self.shape, steps, source, self.base, self.strides),))


def read_archived_tensor(file: BoundedFile) -> ArchivedTensor:
    """Read the description of the one tensor in an archive.

    Raises:
        HeaderError: the archive is not what `torch.save` writes for a plain tensor.
    """
    archive = read_archive(file)
    view = parse_view(read_pickle(archive.read_description(), _ALLOWED, archive.label))
    if view is None or f"data/{view.storage}" not in archive.members:
        raise file.error("is not a plain tensor")
    return locate_tensor(archive, view)


def locate_tensor(archive: Archive, view: TensorView) -> ArchivedTensor:
    """Return where an archive stores a tensor.

    Raises:
        HeaderError: it has no such storage, one of another size, or the tensor does not lie within it.
    """
    name = f"data/{view.storage}"
    if name not in archive.members:
        raise archive.file.error(f"lacks the storage {view.storage[:40]!r} of a tensor")
    storage = archive.locate(name)
    count, rest = divmod(storage.size * 8, BITS[view.dtype])
    if rest or view.count != (storage.size if view.is_untyped else count) or not _is_within_storage(view, count):
        raise archive.file.error("does not lie within its storage" if not archive.file.is_whole else _LIES)
    stored = StoredTensor(archive.file.file, view.dtype, (count,), storage.start, storage.size)
    return ArchivedTensor(stored, view.shape, view.base, view.strides)


_LIES = "describes a tensor that does not lie within its storage"


def parse_view(value: object) -> TensorView | None:
    """Return the view that a pickled tensor or parameter is of a storage, None if the value is anything else."""
    match value:
        case PickledCall(kind, (PickledCall() as data, bool(), PickledCall("collections.OrderedDict", ()), *_)) if (
            kind in _PARAMETERS
        ):
            value = data
    match value:
        case PickledCall(
            kind,
            (
                PickledCall("persistent", ("storage", Global(storage), str(key), _, int(count))),
                int(base),
                tuple(shape),
                tuple(strides),
                bool(),
                PickledCall("collections.OrderedDict", (), None, None),
                *more,
            ),
        ) if len(shape) == len(strides) <= _MAX_DIMS and all(map(is_size, (count, base, *shape, *strides))):
            dtype = _resolve_dtype(kind, storage, more)
            return TensorView(key, dtype, count, storage == _UNTYPED, base, shape, strides) if dtype else None
    return None


def _resolve_dtype(kind: str, storage: str, more: Sequence[object]) -> str | None:
    """Return the dtype of a storage's type, or the one given next to an untyped storage.

    What may follow are flags, such as that the values are the conjugates of the stored ones; with any set, there is no
    dtype that the bytes could be read in.
    """
    match kind, more:
        case (str(), [*_, PickledDict(pairs)]) if not pairs:
            more = more[:-1]
    match kind, more:
        case "torch._utils._rebuild_tensor_v2", []:
            return STORAGES.get(storage)
        case "torch._utils._rebuild_tensor_v3", [Global(dtype)] if storage == _UNTYPED:
            return TORCH_DTYPES.get(dtype)
    return None


def find_unknown_dtype(value: object) -> str | None:
    """Return the dtype that keeps a tensor from being read, or the type of its storage; None if neither does."""
    match value:
        case PickledCall(kind, (PickledCall() as data, *_)) if kind in _PARAMETERS:
            return find_unknown_dtype(data)
        case PickledCall("torch._utils._rebuild_tensor_v2", (PickledCall("persistent", (_, Global(storage), *_)), *_)):
            return None if storage in STORAGES else storage
        case PickledCall("torch._utils._rebuild_tensor_v3", (*_, Global(dtype))):
            return None if dtype in TORCH_DTYPES else dtype
    return None


def unknown_dtype_error(file: Path, name: str, dtype: str) -> CheckpointError:
    """Return the error for a tensor whose dtype is not known."""
    return CheckpointError(
        f"{file}: {shorten(repr(name))} has the dtype {shorten(dtype)}, which is not known here",
        hint="save the tensor in another dtype, such as torch.float32",
        file=str(file),
        tensor=name,
        dtype=dtype,
    )


def _is_within_storage(view: TensorView, count: int) -> bool:
    """Return whether a view's elements lie in a storage of so many elements, none of them twice."""
    elements = prod(view.shape)
    if not 0 < elements <= count:
        return not elements
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    return view.base + last < count


def parse_tensor(archive: Archive, value: object) -> ArchivedTensor | None:
    """Return where an archive stores a pickled tensor or parameter, None if the value is anything else.

    Raises:
        HeaderError: the tensor does not lie within its storage, or the archive lacks it.
    """
    view = parse_view(value)
    return locate_tensor(archive, view) if view is not None else None
