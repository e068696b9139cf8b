"""Very large and very many tensors; odd dtypes."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from runtime.checkpoint.copying.copy import execute_copy_plan
from runtime.checkpoint.copying.copy_plan import Destination, build_copy_plan
from runtime.checkpoint.copying.regions import DigestRegion, FileRegion, MemoryRegion, OpenFiles
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.safetensors import BITS, read_header
from runtime.tensor_map.tensor_map import concatenate, narrow, transpose, whole

GIB = 2**30


def stored(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> int:
    """Write a sparse file of zeros with these tensors and return where their bytes begin."""
    entries, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape)) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + offset)
    return 8 + len(text)


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype_is_moved_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    begin = stored(tmp_path / "a", {"t": (dtype, [6, 16])})
    size = (tmp_path / "a").stat().st_size - begin
    content = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    with (tmp_path / "a").open("r+b") as stream:
        stream.seek(begin)
        stream.write(content.tobytes())
    tensor = whole("t", (6, 16))
    halves = [narrow(tensor, 1, 0, 8), narrow(tensor, 1, 8, 8)]
    wanted = [(Destination("left", size // 2), halves[0]), (Destination("again", size), concatenate(halves, 1))]
    regions = [MemoryRegion(np.zeros(at.size, np.uint8)) for at, _ in wanted]
    execute_copy_plan(build_copy_plan(read_header(tmp_path / "a").tensors, wanted), regions)
    rows = content.reshape(6, -1)
    assert (regions[0].content == rows[:, : rows.shape[1] // 2].reshape(-1)).all()
    assert (regions[1].content == content).all()


@pytest.mark.full
def test_a_tensor_of_five_gigabytes(tmp_path: Path) -> None:
    begin = stored(tmp_path / "a", {"t": ("BF16", [5 * 2**19, 1024])})
    mark = 5 * GIB - 2048 * 3 - 2
    with (tmp_path / "a").open("r+b") as stream:
        stream.seek(begin + mark)
        stream.write(b"ab")
    right = narrow(whole("t", (5 * 2**19, 1024)), 1, 512, 512)
    digest = Digest()
    table = build_copy_plan(
        read_header(tmp_path / "a").tensors,
        [(Destination("right", 5 * GIB // 2, "b", 0), right), (Destination("right", 5 * GIB // 2), right)],
    )
    (tmp_path / "b").touch()
    with OpenFiles(tmp_path) as files:
        execute_copy_plan(table, [FileRegion(files, "b", 0), DigestRegion(digest)])
    row, column = divmod(mark, 2048)
    with (tmp_path / "b").open("rb") as stream:
        stream.seek(row * 1024 + column - 1024)
        assert stream.read(4) == b"ab\0\0"
    expected = Digest()
    expected.add(row * 1024 + column - 1024, np.frombuffer(b"ab", np.uint8))
    assert str(digest) == str(expected)


@pytest.mark.full
def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    count = 100_000
    begin = stored(tmp_path / "a", {f"t{number}": ("I16", [3, 2]) for number in range(count)})
    content = np.arange(count * 6, dtype="<i2")
    with (tmp_path / "a").open("r+b") as stream:
        stream.seek(begin)
        stream.write(content.tobytes())
    wanted = [(Destination(f"t{n}", 12, "b", 12 * n), transpose(whole(f"t{n}", (3, 2)), 0, 1)) for n in range(count)]
    (tmp_path / "b").touch()
    with OpenFiles(tmp_path) as files:
        regions = [FileRegion(files, "b", at.offset) for at, _ in wanted]
        execute_copy_plan(build_copy_plan(read_header(tmp_path / "a").tensors, wanted), regions)
    found = np.fromfile(tmp_path / "b", "<i2").reshape(count, 2, 3)
    assert (found == content.reshape(count, 3, 2).transpose(0, 2, 1)).all()
