"""A tensor inside a `.distcp` file, an archive that `torch.save` wrote: its storage is found, never loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from runtime.checkpoint.dcp.pickle import Global, PickledCall, read_pickle
from runtime.checkpoint.dcp.zip import BoundedFile, ZipMember, find_members
from runtime.checkpoint.files.safetensors import BITS, StoredTensor
from runtime.models.dtypes import DTYPE_NAMES

__all__ = ["STORAGES", "TORCH_DTYPES", "ArchivedTensor", "read_archived_tensor", "read_data_pickle"]

TORCH_DTYPES: Mapping[str, str] = {str(dtype): name for dtype, name in DTYPE_NAMES.items()}
"""safetensors' name of a dtype by torch's, `torch.float32`."""

STORAGES: Mapping[str, str] = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL", "torch.ComplexFloatStorage": "C64",
}  # fmt: skip
"""safetensors' name of the dtype that a storage's type says; other dtypes are said beside an untyped storage."""

_UNTYPED = "torch.storage.UntypedStorage"
_REBUILD_FUNCTIONS = tuple(f"torch._utils._rebuild_tensor_{version}" for version in ("v2", "v3"))
_ALLOWED = frozenset((*TORCH_DTYPES, *STORAGES, _UNTYPED, *_REBUILD_FUNCTIONS, "collections.OrderedDict"))
_MAX_MEMBER = 2**16


@dataclass(frozen=True, slots=True)
class ArchivedTensor:
    """A tensor as an archive stores it.

    Args:
        storage: its elements, as many as there are, in one dim.
        shape: of the tensor.
        base: its first element in the storage.
        strides: storage elements per step along each dim; they need not be row-major.
    """

    storage: StoredTensor
    shape: tuple[int, ...]
    base: int
    strides: tuple[int, ...]


def read_archived_tensor(archive: BoundedFile) -> ArchivedTensor:
    """Read what an archive says of its one tensor.

    Raises:
        HeaderError: it is not what `torch.save` writes for a plain tensor.
    """
    members = find_members(archive)
    if "byteorder" in members and _read_member(archive, members["byteorder"]) != b"little":
        raise archive.error("has its bytes in big-endian order")
    where = f"{archive.file}, the tensor saved at byte {archive.start}"
    view = _parse_view(read_pickle(_read_pickle_member(archive, members), _ALLOWED, where))
    if view is None or f"data/{view.storage}" not in members:
        raise archive.error("is not a plain tensor")
    storage = members[f"data/{view.storage}"].locate(archive)
    count, rest = divmod(storage.size * 8, BITS[view.dtype])
    if rest or not _is_within_storage(view, count):
        raise archive.error("does not lie within its storage")
    stored = StoredTensor(archive.file, view.dtype, (count,), storage.start, storage.size)
    return ArchivedTensor(stored, view.shape, view.base, view.strides)


def read_data_pickle(archive: BoundedFile) -> bytes:
    """Return the pickle of what an archive holds, storages aside.

    Raises:
        HeaderError: it is not what `torch.save` writes.
    """
    return _read_pickle_member(archive, find_members(archive))


def _read_pickle_member(archive: BoundedFile, members: Mapping[str, ZipMember]) -> bytes:
    if "data.pkl" not in members:
        raise archive.error("is no archive of torch.save")
    return _read_member(archive, members["data.pkl"])


def _read_member(archive: BoundedFile, member: ZipMember) -> bytes:
    if member.size > _MAX_MEMBER:
        raise archive.error(f"has a description of {member.size} bytes")
    return member.locate(archive).read()


@dataclass(frozen=True, slots=True)
class _View:
    storage: str
    dtype: str
    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _parse_view(value: object) -> _View | None:
    """Return the view of a storage that a pickled tensor is, None where it is anything else."""
    match value:
        case PickledCall(
            kind,
            (
                PickledCall("persistent", ("storage", Global(storage), str(key), *_)),
                int(base),
                tuple(shape),
                tuple(strides),
                bool(),
                PickledCall("collections.OrderedDict", ()),
                *more,
            ),
        ) if len(shape) == len(strides) and _has_valid_sizes((base, *shape, *strides)):
            dtype = _resolve_dtype(kind, storage, more)
            return _View(key, dtype, base, shape, strides) if dtype else None
    return None


def _resolve_dtype(kind: str, storage: str, more: Sequence[object]) -> str | None:
    """Return the dtype that a storage's type says, or, where it has none, the one given beside it."""
    match kind, more:
        case "torch._utils._rebuild_tensor_v2", []:
            return STORAGES.get(storage)
        case "torch._utils._rebuild_tensor_v3", [Global(dtype)] if storage == _UNTYPED:
            return TORCH_DTYPES.get(dtype)
    return None


def _has_valid_sizes(numbers: Sequence[object]) -> bool:
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _is_within_storage(view: _View, count: int) -> bool:
    """Return whether a view has its elements in a storage of so many, none of them twice."""
    elements = prod(view.shape)
    if not 0 < elements <= count:
        return not elements
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    return view.base + last < count
