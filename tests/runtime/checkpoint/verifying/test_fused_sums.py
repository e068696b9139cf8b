"""The fused sums: what the kernel is told of ranges, and the kernel itself where Triton can run or interpret it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.checkpoint.digest import BLOCK, Digest, block_weights, word_weights
from runtime.checkpoint.verifying import fused_sums
from runtime.checkpoint.verifying.fused_sums import FusedSums, Place, SumRange, find_fused_sums
from runtime.checkpoint.verifying.tensor_digest import DeviceSums
from runtime.tensor_map.strided_copy import Stride, StridedCopy
from tests.runtime.checkpoint.test_digest import by_definition

ROOT = Path(__file__).parents[4]
CPU = torch.device("cpu")
BORDERS = [0, 1, 7, 8, 9, BLOCK * 8 - 9, BLOCK * 8 - 1, BLOCK * 8, BLOCK * 8 + 1, BLOCK * 16 - 3]


def sum_by_definition(table: Any, weights: Any, totals: Any, unit: int, dims: int, most: int) -> None:
    """Do in Python integers what the kernel is told, byte by byte, and refuse what it could not do."""
    for address, target, offset, number, count, width, *strides in table.tolist():
        assert count <= most < 2**31
        assert len(strides) == 12
        assert dims or count == width
        levels = [strides[first : first + 4] for first in range(0, 12, 4)]
        assert prod(steps for steps, *_ in levels) * width == count
        assert not (address | target | offset) % unit
        for index in range(count):
            rest, column = divmod(index, width)
            source, written, place = column * unit, column * unit, offset + column * unit
            for steps, inward, written_stride, outward in levels:
                rest, step = divmod(rest, steps)
                source, place = source + step * inward * unit, place + step * outward
                written += step * written_stride * unit
            if target:
                ctypes.memmove(target + written, address + source, unit)
            word = int.from_bytes(ctypes.string_at(address + source, unit), "little") << place % 8 * 8
            for lane, value in ((0, word), (1, word >> 32)):
                inner = int(word_weights(lane)[place // 8 % BLOCK])
                outer = int(block_weights(lane, place // 8 // BLOCK, 1)[0])
                total = (int(totals[number, lane]) + inner * outer * value) % 2**64
                totals[number, lane] = total - 2**64 if total >= 2**63 else total


def sums_with(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> type[DeviceSums]:
    from runtime.checkpoint.verifying import tensor_digest

    fused = FusedSums(kernel, CPU)
    monkeypatch.setattr(tensor_digest, "find_fused_sums", lambda device: fused)
    return DeviceSums


GAP = 8
"""Bytes between two steps where they are written, which must stay as they are."""


def iter_starts(copy: StridedCopy, which: Literal["source_stride", "destination_stride"]) -> Iterator[int]:
    """Yield the offset of each contiguous piece, in the source or in the destination."""
    begin = copy.source_offset if which == "source_stride" else copy.destination_offset
    for index in np.ndindex(*(stride.steps for stride in copy.strides)):
        yield begin + sum(int(step) * getattr(stride, which) for step, stride in zip(index, copy.strides, strict=True))


def place_apart(copy: StridedCopy) -> tuple[bytearray, Place]:
    """Return zeros with room for all pieces of a copy, a gap behind each, and where they go there."""
    span, strides = copy.length + GAP, list[int]()
    for stride in reversed(copy.strides):
        strides.insert(0, span)
        span *= stride.steps
    memory = bytearray(span)
    return memory, Place(ctypes.addressof(ctypes.c_char.from_buffer(memory)), tuple(strides))


def expected(content: bytes, copy: StridedCopy) -> str:
    """Place the bytes in a parameter of zeros, and digest that by the definition."""
    reach = copy.destination_offset + copy.length + sum((s.steps - 1) * s.destination_stride for s in copy.strides)
    whole = bytearray(reach)
    for source, place in zip(iter_starts(copy, "source_stride"), iter_starts(copy, "destination_stride"), strict=True):
        whole[place : place + copy.length] = content[source : source + copy.length]
    return by_definition(bytes(whole))


@st.composite
def ranges(draw: st.DrawFn) -> tuple[bytes, StridedCopy]:
    """Return bytes and a copy from them whose steps overlap nowhere, near borders of words and blocks."""
    unit = draw(st.sampled_from([1, 2, 4, 8]))
    length = draw(st.integers(1, 40)) * unit
    offset = max(0, draw(st.sampled_from(BORDERS)) + draw(st.integers(-9, 9)))
    offset -= offset % unit
    strides: list[Stride] = []
    source, destination = length, length
    for _ in range(draw(st.integers(0, 4))):
        steps = draw(st.integers(2, 3))
        source += draw(st.integers(0, 3)) * unit
        destination += draw(st.integers(0, 3)) * unit
        strides.insert(0, Stride(steps, source, destination))
        source, destination = source * steps, destination * steps
    start = draw(st.integers(0, 9)) * unit
    content = np.random.default_rng(draw(st.integers(0, 99))).bytes(start + source + length)
    return content, StridedCopy(0, start, 1, offset, length, tuple(strides))


@settings(max_examples=25)
@given(one=ranges(), limit=st.sampled_from([16, 64, 2**30]))
def test_ranges_are_told_as_they_are(one: tuple[bytes, StridedCopy], limit: int) -> None:
    content, copy = one
    assume(copy.size < 4000)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fused_sums, "_MAX_BYTES", limit)
        kernel = SimpleNamespace(FIELDS=18, MAX_DIMS=3, launch_sums=sum_by_definition)
        sums = sums_with(kernel, monkeypatch)(2, CPU)
        assert sums.can_write
        memory, place = place_apart(copy)
        sums.add([SumRange(torch.frombuffer(bytearray(content), dtype=torch.uint8), copy, place)])
    assert [str(digest) for digest in sums.read()] == ["0" * 32, expected(content, copy)]
    assert bytes(memory) == b"".join(
        content[start : start + copy.length] + bytes(GAP) for start in iter_starts(copy, "source_stride")
    )


@settings(max_examples=25)
@given(one=ranges())
def test_sums_without_the_kernel_are_the_same(one: tuple[bytes, StridedCopy]) -> None:
    content, copy = one
    sums = DeviceSums(2, CPU)
    sums.add([SumRange(torch.frombuffer(bytearray(content), dtype=torch.uint8), copy)])
    assert [str(digest) for digest in sums.read()] == ["0" * 32, expected(content, copy)]


def test_a_kernel_that_fails_or_sums_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler")

    for launch, why in ((fail, "no compiler"), (lambda *_: None, "its sums are wrong")):
        kernel = SimpleNamespace(FIELDS=18, MAX_DIMS=3, launch_sums=launch)
        monkeypatch.setitem(sys.modules, "runtime.checkpoint.verifying.sum_kernel", kernel)
        monkeypatch.setattr("runtime.checkpoint.verifying.sum_kernel", kernel, raising=False)
        monkeypatch.setattr(fused_sums, "FusedSums", lambda kernel, device: FusedSums(kernel, CPU))
        find_fused_sums.cache_clear()
        with pytest.warns(UserWarning, match=why):
            assert find_fused_sums(torch.device("cuda", 0)) is None
    find_fused_sums.cache_clear()


def test_a_processor_has_no_kernel() -> None:
    assert find_fused_sums(CPU) is None


def check_kernel() -> None:
    """Compare the interpreted kernel with the definition; started in a process of its own, which Triton needs."""
    from runtime.checkpoint.verifying import sum_kernel

    fused = FusedSums(sum_kernel, CPU)
    assert fused.matches_definition()
    generator = np.random.default_rng(0)
    for border in BORDERS[1::3]:
        for unit in (1, 2, 4, 8):
            content = generator.bytes(4096 * unit)
            for copy in (
                StridedCopy(0, 0, 0, border - border % unit, 3 * unit),
                StridedCopy(0, unit, 0, border - border % unit, unit * 2100),
                StridedCopy(0, 0, 0, border - border % unit, 5 * unit, (Stride(9, 40 * unit, 6 * unit),)),
                StridedCopy(0, 0, 0, 0, unit, (Stride(3, 64 * unit, 90 * unit), Stride(7, 8 * unit, unit * 3))),
            ):
                totals = torch.zeros(1, 2, dtype=torch.int64)
                memory, place = place_apart(copy)
                fused([SumRange(torch.frombuffer(bytearray(content), dtype=torch.uint8), copy, place)], totals)
                pieces = (content[start : start + copy.length] for start in iter_starts(copy, "source_stride"))
                assert bytes(memory) == b"".join(piece + bytes(GAP) for piece in pieces)
                assert str(Digest(*(lane % 2**64 for lane in totals[0].tolist()))) == expected(content, copy)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which torch's builds for GPUs bring")
def test_the_kernel_is_what_the_definition_says() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    code = "from tests.runtime.checkpoint.verifying.test_fused_sums import check_kernel; check_kernel()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=ROOT)
