"""Execution: bytes arrive where the forms say, whatever the slab size, in destinations and digests alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from plans.errors import CheckpointError, UsageError
from runtime.checkpoint.copying import copy
from runtime.checkpoint.copying.copy import execute_copy_plan, plan_units
from runtime.checkpoint.copying.copy_plan import Destination, build_copy_plan
from runtime.checkpoint.copying.read_back import is_intact
from runtime.checkpoint.copying.regions import DigestRegion, FileRegion, MemoryRegion, OpenFiles, build_regions
from runtime.checkpoint.copying.strided import Bytes
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.safetensors import read_header
from runtime.tensor_map.tensor_map import TensorMap, concatenate, narrow, stack, transpose, whole

GAPS = ("transposed", "joined columns", "stacked", "halved and interleaved")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(12, 10, dtype=torch.bfloat16),
        "b": torch.randn(12, 10, dtype=torch.bfloat16),
        "byte": torch.randint(0, 255, (7, 9), dtype=torch.uint8),
        "long": torch.randint(0, 2**62, (5, 6)),
    }
    file = tmp_path_factory.mktemp("copy") / "model.safetensors"
    save_file(tensors, file)
    return file, tensors


def fused() -> tuple[TensorMap, Callable[[dict[str, torch.Tensor]], torch.Tensor]]:
    pair = [whole("a", (12, 10)), whole("b", (12, 10))]
    return concatenate(pair, 1), lambda t: torch.cat([t["a"], t["b"]], 1)


CASES: dict[str, tuple[TensorMap, Callable[[dict[str, torch.Tensor]], torch.Tensor]]] = {
    "whole": (whole("a", (12, 10)), lambda t: t["a"]),
    "rows": (narrow(whole("byte", (7, 9)), 0, 2, 4), lambda t: t["byte"][2:6]),
    "columns": (narrow(whole("long", (5, 6)), 1, 1, 3), lambda t: t["long"][:, 1:4]),
    "odd columns": (narrow(whole("byte", (7, 9)), 1, 2, 5), lambda t: t["byte"][:, 2:7]),
    "transposed": (transpose(whole("a", (12, 10)), 0, 1), lambda t: t["a"].T),
    "joined columns": fused(),
    "stacked": (
        stack([whole("a", (12, 10)), whole("b", (12, 10))], 1),
        lambda t: torch.stack([t["a"], t["b"]], 1),
    ),
    "halved and interleaved": (
        stack([narrow(whole("a", (12, 10)), 1, 0, 5), narrow(whole("b", (12, 10)), 1, 5, 5)], 2),
        lambda t: torch.stack([t["a"][:, :5], t["b"][:, 5:]], 2),
    ),
    "empty": (narrow(whole("a", (12, 10)), 0, 12, 0), lambda t: t["a"][12:]),
}


class Once:
    """A region in memory that counts how often each byte comes, in pieces or, if it takes them, in rows."""

    def __init__(self, size: int, takes_rows: bool) -> None:
        self.memory, self.counts = MemoryRegion(np.zeros(size, np.uint8)), MemoryRegion(np.zeros(size, np.uint8))
        self.takes_rows = takes_rows

    def write(self, offset: int, piece: Bytes) -> None:
        self.memory.write(offset, piece)
        self.counts.content[offset : offset + len(piece)] += 1

    def write_rows(self, offset: int, rows: np.ndarray, stride: int) -> bool:
        if self.takes_rows:
            self.memory.write_rows(offset, rows, stride)
            for row in range(len(rows)):
                start = offset + row * stride
                self.counts.content[start : start + rows.shape[1] * rows.itemsize] += 1
        return self.takes_rows

    def read(self, offset: int, buffer: Bytes) -> None:
        self.memory.read(offset, buffer)


@given(slab=st.integers(1, 300), block=st.integers(1, 300), case=st.sampled_from(sorted(CASES)), rows=st.booleans())
def test_every_slab_size_gives_the_same_bytes(
    stored: tuple[Path, dict[str, torch.Tensor]], slab: int, block: int, case: str, rows: bool
) -> None:
    file, tensors = stored
    form, build = CASES[case]
    expected = build(tensors).contiguous().reshape(-1).view(torch.uint8).numpy()
    region, digest = Once(expected.size, rows), Digest()
    wanted = [(Destination(case, expected.size, "x"), form), (Destination(case, expected.size), form)]
    tables = build_copy_plan(read_header(file).tensors, wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy, "_SLAB", slab)
        patch.setattr(copy, "BLOCK", block)
        execute_copy_plan(tables, [region, DigestRegion(digest)], max_memory=2**20)
    once = Digest()
    once.add(0, expected)
    assert (region.memory.content == expected).all()
    assert rows or case not in GAPS or (region.counts.content > 0).all()
    assert case in GAPS or (region.counts.content == 1).all()
    assert str(digest) == str(once)


def test_what_is_kept_has_reached_its_place(
    stored: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [(Destination(case, size_of(case), case), CASES[case][0]) for case in GAPS]
    wanted += [(Destination(case, size_of(case)), CASES[case][0]) for case in GAPS]
    tables, digests = build_copy_plan(read_header(stored[0]).tensors, wanted), {case: Digest() for case in GAPS}
    monkeypatch.setattr(copy, "_SLAB", 48)
    kept: list[int] = []
    for case in GAPS:
        (tmp_path / case).touch()
    with OpenFiles(tmp_path) as files:
        regions = build_regions(tables.destinations, files, list(digests.values()))

        class EveryUnit:
            units = 0

            def is_due(self) -> bool:
                return True

            def record(self, units: int, bytes_done: int) -> None:
                expected = {name: str(digest) for name, digest in digests.items()}
                assert is_intact(tables, regions, islice(plan_units(tables, 2**20), units), expected)
                kept.append(units)

        execute_copy_plan(tables, regions, max_memory=2**20, recorder=EveryUnit())
    assert kept == list(range(1, 1 + sum(1 for _ in plan_units(tables, 2**20))))
    assert len(kept) > 5


def size_of(case: str) -> int:
    return 2 * prod(CASES[case][0].shape)


def test_short_reads_and_writes_are_continued(
    stored: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tensors = stored
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr("os.pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    monkeypatch.setattr("os.preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:5]], offset))
    (tmp_path / "out").touch()
    with OpenFiles(tmp_path) as files:
        table = build_copy_plan(read_header(file).tensors, [(Destination("a", 240, "out", 3), whole("a", (12, 10)))])
        assert execute_copy_plan(table, [FileRegion(files, "out", 3)]) == 240
    expected = tensors["a"].view(torch.uint8).numpy().tobytes()
    assert (tmp_path / "out").read_bytes() == b"\0\0\0" + expected


def test_a_failing_disk_is_one_clear_error(
    stored: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    table = build_copy_plan(read_header(stored[0]).tensors, [(Destination("a", 240), whole("a", (12, 10)))])
    monkeypatch.setattr("os.preadv", fail)
    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        execute_copy_plan(table, [DigestRegion(Digest())])
    assert str(stored[0]) in caught.value.message


def test_a_failing_digest_stops_the_copy(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    class Failing(Once):
        def write(self, offset: int, piece: Bytes) -> None:
            raise ArithmeticError

    table = build_copy_plan(read_header(stored[0]).tensors, [(Destination("a", 240), whole("a", (12, 10)))])
    with pytest.raises(ArithmeticError):
        execute_copy_plan(table, [Failing(240, takes_rows=False)])


def test_too_little_memory_is_refused(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    table = build_copy_plan(read_header(stored[0]).tensors, [(Destination("a", 240), whole("a", (12, 10)))])
    with pytest.raises(UsageError, match="max_memory must be at least 1 MiB, got"):
        execute_copy_plan(table, [DigestRegion(Digest())], max_memory=1000)
