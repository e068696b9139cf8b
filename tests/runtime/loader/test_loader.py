"""The loader's parts: planning reads, copying elements into place, and pinned buffers for a GPU."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime.loader.reads
from plans.errors import IncompleteError, UsageError
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.verifying import tensor_digest
from runtime.checkpoint.verifying.fused_sums import FusedSums
from runtime.checkpoint.verifying.tensor_digest import DeviceSums
from runtime.loader import transfer, workers
from runtime.loader.reads import (
    Read,
    build_target,
    compute_buffer_offsets,
    copy_elements,
    group_reads,
    plan_reads,
)
from runtime.loader.workers import CudaWorker, ReadOnlyFiles, Targets, run_workers
from runtime.models.config import read_config
from runtime.models.model import meta_model
from runtime.tensor_map.strided_copy import Stride, StridedCopy, plan_copies
from runtime.tensor_map.tensor_map import concatenate, narrow, transpose, whole
from tests.runtime.loader.load_cases import differing, local_tensors

HubFolder = Callable[[str], Path]
FILE = Path("file")
KIB = 2**10


def stored(size: int, offset: int = 0) -> StoredTensor:
    return StoredTensor(FILE, "U8", (size,), offset, size)


def ranges(planned: Iterable[Read]) -> list[tuple[int, int]]:
    return [(read.start, read.stop) for read in planned]


def never_alone(part: StridedCopy) -> bool:
    return False


def test_neighbours_share_a_read_and_wide_gaps_are_skipped() -> None:
    sources = [stored(100 * KIB, 8), stored(100 * KIB, 8 + 112 * KIB), stored(8 * KIB, 8 + 400 * KIB)]
    copies = [StridedCopy(number, 0, number, 0, source.size) for number, source in enumerate(sources)]
    assert ranges(plan_reads(sources, copies, 2**20, never_alone)) == [
        (8, 8 + 212 * KIB),
        (8 + 400 * KIB, 8 + 408 * KIB),
    ]


def test_a_part_that_must_be_alone_is_alone() -> None:
    sources = [stored(KIB, 0), stored(KIB, KIB), stored(KIB, 2 * KIB)]
    copies = [StridedCopy(number, 0, number, 0, KIB) for number in range(3)]
    planned = list(plan_reads(sources, copies, 2**20, lambda part: part.source == 1))
    assert [[part.source for part in read.parts] for read in planned] == [[0], [1], [2]]
    assert ranges(planned) == [(0, KIB), (KIB, 2 * KIB), (2 * KIB, 3 * KIB)]  # none reads the middle again


def test_rows_far_apart_are_read_one_by_one_and_rows_nearby_with_their_gaps() -> None:
    size = 4 * 2**20
    far = StridedCopy(0, 0, 0, 0, KIB, (Stride(4, 2**20, KIB),))
    assert ranges(plan_reads([stored(size)], [far], size, never_alone)) == [
        (n * 2**20, n * 2**20 + KIB) for n in range(4)
    ]
    near = StridedCopy(0, 0, 0, 0, KIB, (Stride(4, 32 * KIB, KIB),))
    assert ranges(plan_reads([stored(size)], [near], size, never_alone)) == [(0, 97 * KIB)]


def test_parts_that_follow_one_another_on_both_sides_are_one() -> None:
    sources = [stored(KIB, 0), stored(KIB, KIB), stored(KIB, 2 * KIB)]
    copies = [StridedCopy(0, 0, 7, 0, KIB), StridedCopy(1, 0, 7, KIB, KIB), StridedCopy(2, 0, 7, 0, KIB)]
    (read,) = plan_reads(sources, copies, 2**20, never_alone)
    assert [(part.source_offset, part.destination_offset, part.length) for part in read.parts] == [
        (0, 0, 2 * KIB),
        (2 * KIB, 0, KIB),
    ]


def test_elements_stay_aligned_wherever_tensors_begin() -> None:
    sources = [stored(9), stored(64, 9)]
    copies = [StridedCopy(0, 0, 0, 0, 9), StridedCopy(1, 0, 1, 0, 64)]
    planned = list(plan_reads(sources, copies, 2**20, never_alone))
    assert ranges(planned) == [(0, 9), (9, 73)]
    assert compute_buffer_offsets(planned) == [0, 16]


def test_groups_fit_into_their_buffer() -> None:
    generator = random.Random(0)
    planned = [Read(FILE, 0, generator.randint(1, 4096), ()) for _ in range(500)]
    groups = list(group_reads(planned, 4096))
    assert [read for group in groups for read in group] == planned
    assert all(
        offset + read.size <= 4096
        for group in groups
        for read, offset in zip(group, compute_buffer_offsets(group), strict=True)
    )


@settings(max_examples=150)
@given(st.data())
def test_reads_cover_all_copies(data: st.DataObject) -> None:
    """Random tensor maps, read through small buffers with small gaps, give what torch's own operations give."""
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=3)))
    content = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.int16)
    tensor_map, expected = whole("t", shape), content.reshape(shape)
    for _ in range(data.draw(st.integers(0, 3))):
        dim = data.draw(st.integers(0, len(shape) - 1))
        length = data.draw(st.integers(1, tensor_map.shape[dim]))
        start = data.draw(st.integers(0, tensor_map.shape[dim] - length))
        tensor_map, expected = narrow(tensor_map, dim, start, length), expected.narrow(dim, start, length)
        if data.draw(st.booleans()):
            tensor_map, expected = transpose(tensor_map, 0, dim), expected.transpose(0, dim)
        if data.draw(st.booleans()):
            tensor_map, expected = concatenate([tensor_map, tensor_map], dim), torch.cat([expected, expected], dim)
    limit = data.draw(st.integers(16, 64)) * 2
    file = b"header" + content.numpy().tobytes()
    target = build_target(torch.zeros(tensor_map.shape, dtype=torch.float32), torch.int16)
    sources = [StoredTensor(FILE, "I16", shape, 6, content.nbytes)]
    with patch.object(runtime.loader.reads, "_MAX_GAP", data.draw(st.integers(1, 64))):
        planned = list(plan_reads(sources, plan_copies(tensor_map, 16, {"t": 0}, 0), limit, never_alone))
    for read in planned:
        assert read.size <= limit
        buffer = torch.zeros(limit, dtype=torch.uint8)
        buffer[: read.size] = torch.frombuffer(bytearray(file[read.start : read.stop]), dtype=torch.uint8)
        for part in read.parts:
            copy_elements(part, buffer, read.start, target)
    assert torch.equal(target.memory.reshape(tensor_map.shape), expected.float())


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kernel", [None, "kernel"])
def test_pinned_buffers_give_the_same_as_direct_reads(
    name: str, dtype: torch.dtype | None, kernel: str | None, hub_folder: HubFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (meta_model(read_config(hub_folder(name))) for _ in range(2))
    runtime.load(one, hub_folder(name), dtype=dtype)
    moved = let_a_kernel_move_bytes(monkeypatch) if kernel else []
    with as_if_on_a_gpu(monkeypatch) as made:
        runtime.load(other, hub_folder(name), dtype=dtype, threads=3)
    assert len(made) == 3
    assert not differing(local_tensors(other), local_tensors(one))
    assert bool(moved) == (kernel is not None)


def let_a_kernel_move_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Use a kernel that writes bytes but sums nothing; return the list that gets how many it wrote each time."""
    moved: list[int] = []

    def launch(table: torch.Tensor, weights: object, totals: object, unit: int, dims: int, most: int) -> None:
        for address, target, _, _, count, width, *strides in table.tolist():
            levels = [strides[first : first + 3] for first in range(0, len(strides), 4)]
            for index in np.ndindex(*(steps for steps, *_ in levels)):
                source, place = (
                    sum(int(step) * level[side] * unit for step, level in zip(index, levels, strict=True))
                    for side in (1, 2)
                )
                if target:
                    ctypes.memmove(target + place, address + source, width * unit)
            moved.append(count * unit if target else 0)

    kernel = SimpleNamespace(FIELDS=18, MAX_DIMS=3, launch_sums=launch)
    monkeypatch.setattr(tensor_digest, "find_fused_sums", lambda device: FusedSums(kernel, device))
    return moved


def test_no_copy_is_pending_after_a_failed_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "short"
    file.write_bytes(bytes(64))
    work = [(Read(file, start, start + 64, (StridedCopy(0, start, 0, start, 64),)),) for start in (0, 64)]
    targets = {0: build_target(torch.zeros(128, dtype=torch.uint8), torch.uint8)}
    with as_if_on_a_gpu(monkeypatch):
        waited: list[bool] = []
        stream = torch.cuda.Stream(torch.device("cpu"))
        stream.synchronize = lambda: waited.append(True)
        with pytest.raises(IncompleteError, match="short"), ReadOnlyFiles() as files:
            run_workers(work, 1, lambda: CudaWorker(targets, files, 64, torch.device("cpu"), stream))
    assert waited == [True]


@contextmanager
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CudaWorker]]:
    """Let the GPU worker fill tensors in host memory, through small buffers."""
    made: list[CudaWorker] = []
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "set_device", lambda device: None)
        patched.setattr(torch.cuda, "Stream", lambda device: stream)
        patched.setattr(torch.cuda, "Event", lambda: event)
        patched.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
        patched.setattr(workers, "_allocate_pinned", lambda size: torch.full((size,), 77, dtype=torch.uint8))
        patched.setattr(transfer, "choose_block_size", lambda size, threads, device: 4 * KIB)
        patched.setattr(transfer, "_make_alone_predicate", lambda targets, device: never_alone)

        def make_factory(
            targets: Targets, files: ReadOnlyFiles, block: int, device: torch.device, sums: DeviceSums | None
        ) -> Callable[[], CudaWorker]:
            def make_worker() -> CudaWorker:
                made.append(CudaWorker(targets, files, block, device, stream, sums))
                return made[-1]

            return make_worker

        patched.setattr(transfer, "_make_worker_factory", make_factory)
        patched.setattr(transfer, "_make_sums", lambda count, size, device, with_digests: DeviceSums(count, device))
        yield made


def test_unsupported_devices_are_refused(hub_folder: HubFolder) -> None:
    model = meta_model(read_config(hub_folder("llama")))
    with pytest.raises(
        UsageError, match=r"(?s)cannot load into tensors on meta.*hint: load on cpu or cuda, then move the model"
    ):
        runtime.load(model, hub_folder("llama"), device="meta")
