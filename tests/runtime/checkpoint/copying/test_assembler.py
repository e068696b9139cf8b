"""Assembling: blocks that are put off for want of memory are gone on with, on one thread or several."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from runtime.checkpoint.copying.assembler import Assembler
from runtime.checkpoint.copying.regions import DigestRegion, MemoryRegion
from runtime.checkpoint.digest import Digest
from runtime.tensor_map.strided_copy import Stride, StridedCopy

ROWS, COLUMNS = 60, 50
SOURCE = np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS, 2), np.uint8)


def rows() -> list[StridedCopy]:
    """The rows of a matrix of two-byte elements, each of which becomes a column of the transposed one."""
    width = COLUMNS * 2
    runs = [StridedCopy(0, row * width, 0, row * 2, 2, (Stride(COLUMNS, 2, ROWS * 2),)) for row in range(ROWS)]
    random.Random(0).shuffle(runs)
    return runs


@pytest.mark.parametrize("block", [1, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 4])
def test_every_byte_arrives_however_little_memory_there_is(block: int, blocks: int, threads: int) -> None:
    memory, digest = MemoryRegion(np.full(SOURCE.size, 255, np.uint8)), Digest()
    regions = [memory, DigestRegion(digest)]
    assembler = Assembler(regions, [SOURCE.size] * 2, block * blocks, block, is_new=True)
    flat = SOURCE.reshape(-1)

    def add(run: StridedCopy) -> None:
        for destination in (0, 1):
            assembler.add(run._replace(destination=destination), flat, 0)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(add, rows()))
    assembler.flush()
    expected = np.ascontiguousarray(SOURCE.transpose(1, 0, 2)).reshape(-1)
    once = Digest()
    once.add(0, expected)
    assert (memory.content == expected).all()
    assert str(digest) == str(once)


def test_blocks_that_are_put_off_leave_their_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, sizes = np.empty, []
    memory = MemoryRegion(np.zeros(SOURCE.size, np.uint8))
    assembler = Assembler([memory], [SOURCE.size], 5 * 64, 64, is_new=True)
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", lambda *arguments: sizes.append(arguments[0]) or allocate(*arguments))
        for run in rows():
            assembler.add(run, SOURCE.reshape(-1), 0)
        assembler.flush()
    assert (memory.content.reshape(COLUMNS, ROWS, 2) == SOURCE.transpose(1, 0, 2)).all()
    assert sizes == [64] * 5, "as many buffers as blocks may be open"


def test_a_later_run_keeps_what_an_earlier_one_wrote() -> None:
    memory = MemoryRegion(np.zeros(SOURCE.size, np.uint8))
    runs = rows()
    for is_new, part in ((True, runs[:20]), (False, runs[20:])):
        assembler = Assembler([memory], [SOURCE.size], 10**6, 64, is_new=is_new)
        for run in part:
            assembler.add(run, SOURCE.reshape(-1), 0)
        assembler.flush()
    assert (memory.content.reshape(COLUMNS, ROWS, 2) == SOURCE.transpose(1, 0, 2)).all()
