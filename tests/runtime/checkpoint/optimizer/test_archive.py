"""Archives laid out ahead: torch loads what they hold, whatever its dtype, shape and size."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorProperties

from runtime.checkpoint.checkpoint import TensorInfo
from runtime.checkpoint.dcp.metadata import StorageLocation, read_metadata
from runtime.checkpoint.optimizer.archive import ALIGNMENT, build_tensor_archive, build_value_archive
from runtime.checkpoint.optimizer.writer import SavedChunk, encode_metadata
from runtime.checkpoint.pickled.archive import BoundedFile, read_archive
from runtime.checkpoint.pickled.tensors import read_archived_tensor
from runtime.models.dtypes import DTYPES

ONE = b"\x00\x00\x80\x3f"


def filled(dtype: str, content: torch.Tensor) -> bytes:
    archive = build_tensor_archive(dtype, content.shape)
    result = archive.head + content.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() + archive.tail
    assert len(result) == archive.length
    assert len(archive.head) % ALIGNMENT == 0
    return result


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_we_read_what_an_archive_holds(dtype: str, shape: Sequence[int], tmp_path: Path) -> None:
    content = torch.arange(torch.Size(shape).numel()).reshape(shape).to(DTYPES[dtype])
    archive = filled(dtype, content)
    found = torch.load(io.BytesIO(archive), weights_only=True)
    assert (found.dtype, found.shape) == (content.dtype, content.shape)
    assert torch.equal(found.reshape(-1).view(torch.uint8), content.reshape(-1).view(torch.uint8))
    (tmp_path / "archive").write_bytes(archive)
    with (tmp_path / "archive").open("rb") as stream:
        ours = read_archived_tensor(BoundedFile(stream.fileno(), tmp_path / "archive", 0, len(archive)))
    assert (ours.storage.dtype, ours.shape, ours.base) == (dtype, tuple(shape), 0)


# Around the sizes at which a member, and then the directory's place, no longer fit 32 bits.
@pytest.mark.parametrize("elements", [2**30 - 150, 2**30 - 1, 2**30, 2**30 + 2**28])
def test_archives_of_over_four_gigabytes(elements: int, tmp_path: Path) -> None:
    archive = build_tensor_archive("F32", (elements,))
    path = tmp_path / "archive"
    with path.open("wb") as stream:
        stream.write(archive.head)
        stream.seek(len(archive.head) + archive.size - len(ONE))
        stream.write(ONE + archive.tail)
    found = torch.load(path, weights_only=True, mmap=True)
    assert found.shape == (elements,)
    assert found[[0, -2, -1]].tolist() == [0, 0, 1]
    with path.open("rb") as stream:
        ours = read_archived_tensor(BoundedFile(stream.fileno(), path, 0, os.fstat(stream.fileno()).st_size))
    assert (ours.storage.offset, ours.storage.size) == (len(archive.head), archive.size)
    assert zipfile.ZipFile(path).getinfo("archive/data/0").file_size == archive.size


@pytest.mark.parametrize("value", [0.01, 3, True, None, "adamw", (0.9, 0.95), [1, [2]], {"a": {"b": 1}}], ids=str)
def test_values_come_back(value: object, tmp_path: Path) -> None:
    pickled = pickle.dumps(value, protocol=2)
    archive = build_value_archive(pickled)
    assert torch.load(io.BytesIO(archive), weights_only=True) == value
    assert zipfile.ZipFile(io.BytesIO(archive)).testzip() is None
    (tmp_path / "archive").write_bytes(archive)
    with (tmp_path / "archive").open("rb") as stream:
        assert read_archive(BoundedFile(stream.fileno(), tmp_path, 0, len(archive))).read_description() == pickled


def test_metadata_has_the_fields_that_every_torch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.15 pickles the strides too, and older releases fail on a sixth field."""
    tensors = {"a": TensorInfo("parameter", "BF16", (4, 2))}
    chunks = {"a": [SavedChunk((0, 0), (4, 2), StorageLocation("__0_0.distcp", 0, 100))]}
    expected = encode_metadata(tensors, chunks, {}, {})
    assert pickle.loads(expected).state_dict_metadata["a"].properties.dtype == torch.bfloat16
    five = TensorProperties.__getstate__

    def six(self: TensorProperties) -> tuple[object, ...]:
        return (*five(self)[:5], (2, 1))

    monkeypatch.setattr(TensorProperties, "__getstate__", six)
    assert encode_metadata(tensors, chunks, {}, {}) == expected


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("strides", [None, (2, 1), (1, 4)])
def test_metadata_with_strides_is_read(
    strides: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    five = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*five(self)[:5], strides))
    dcp.save({"a": torch.ones(4, 2, dtype=torch.bfloat16)}, checkpoint_id=tmp_path, no_dist=True)
    (chunk,) = read_metadata(tmp_path).chunks
    assert (chunk.name, chunk.dtype, chunk.shape) == ("a", "BF16", (4, 2))
