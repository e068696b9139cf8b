"""The loader's parts: what is read of files, where it goes in memory, and the way that bytes take to a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime.loader.reads
from plans.errors import IncompleteError, UsageError
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.loader import transfer
from runtime.loader.reads import Read, compute_buffer_offsets, group_reads, plan_reads
from runtime.loader.transfer import CudaWorker
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


def ranges(found: Iterator[Read]) -> list[tuple[int, int]]:
    return [(read.start, read.stop) for read in found]


def together(part: StridedCopy) -> bool:
    return False


def test_neighbours_are_read_at_once_and_wide_gaps_left_out() -> None:
    sources = [stored(100 * KIB, 8), stored(100 * KIB, 8 + 112 * KIB), stored(8 * KIB, 8 + 400 * KIB)]
    runs = [StridedCopy(number, 0, number, 0, one.size) for number, one in enumerate(sources)]
    assert ranges(plan_reads(sources, runs, 2**20, together)) == [(8, 8 + 212 * KIB), (8 + 400 * KIB, 8 + 408 * KIB)]


def test_what_is_to_be_alone_is_alone() -> None:
    sources = [stored(KIB, 0), stored(KIB, KIB), stored(KIB, 2 * KIB)]
    runs = [StridedCopy(number, 0, number, 0, KIB) for number in range(3)]
    found = list(plan_reads(sources, runs, 2**20, lambda part: part.source == 1))
    assert [[part.source for part in read.parts] for read in found] == [[1], [0, 2]]


def test_rows_far_apart_are_read_one_by_one_and_rows_nearby_with_what_lies_between() -> None:
    size = 4 * 2**20
    far = StridedCopy(0, 0, 0, 0, KIB, (Stride(4, 2**20, KIB),))
    assert ranges(plan_reads([stored(size)], [far], size, together)) == [(n * 2**20, n * 2**20 + KIB) for n in range(4)]
    near = StridedCopy(0, 0, 0, 0, KIB, (Stride(4, 32 * KIB, KIB),))
    assert ranges(plan_reads([stored(size)], [near], size, together)) == [(0, 97 * KIB)]


def test_elements_stay_aligned_where_tensors_begin_anywhere() -> None:
    sources = [stored(9), stored(64, 9)]
    found = list(plan_reads(sources, [StridedCopy(0, 0, 0, 0, 9), StridedCopy(1, 0, 1, 0, 64)], 2**20, together))
    assert ranges(iter(found)) == [(0, 9), (9, 73)]
    assert compute_buffer_offsets(found) == [0, 16]


def test_units_fit_into_their_buffer() -> None:
    source = random.Random(0)
    found = [Read(FILE, 0, source.randint(1, 4096), ()) for _ in range(500)]
    made = list(group_reads(found, 4096))
    assert [read for unit in made for read in unit] == found
    assert all(
        begin + read.size <= 4096
        for unit in made
        for read, begin in zip(unit, compute_buffer_offsets(unit), strict=True)
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_reads_hold_all_that_runs_need(data: st.DataObject) -> None:
    """Forms cut and turned at random, read through small buffers with small gaps, give what torch gives."""
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=3)))
    content = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.int16)
    form, expected = whole("t", shape), content.reshape(shape)
    for _ in range(data.draw(st.integers(0, 3))):
        dim = data.draw(st.integers(0, len(shape) - 1))
        length = data.draw(st.integers(1, form.shape[dim]))
        start = data.draw(st.integers(0, form.shape[dim] - length))
        form, expected = narrow(form, dim, start, length), expected.narrow(dim, start, length)
        if data.draw(st.booleans()):
            form, expected = transpose(form, 0, dim), expected.transpose(0, dim)
        if data.draw(st.booleans()):
            form, expected = concatenate([form, form], dim), torch.cat([expected, expected], dim)
    limit = data.draw(st.integers(16, 64)) * 2
    file = b"header" + content.numpy().tobytes()
    target = transfer.build_target(torch.zeros(form.shape, dtype=torch.float32), torch.int16)
    sources = [StoredTensor(FILE, "I16", shape, 6, content.nbytes)]
    with patch.object(runtime.loader.reads, "_MAX_GAP", data.draw(st.integers(1, 64))):
        found = list(plan_reads(sources, plan_copies(form, 16, {"t": 0}, 0), limit, together))
    for read in found:
        assert read.size <= limit
        buffer = torch.zeros(limit, dtype=torch.uint8)
        buffer[: read.size] = torch.frombuffer(bytearray(file[read.start : read.stop]), dtype=torch.uint8)
        for part in read.parts:
            transfer.copy_elements(part, buffer, read.start, target)
    assert torch.equal(target.memory.reshape(form.shape), expected.float())


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pinned_buffers_bring_the_same_as_reading_directly(
    name: str, dtype: torch.dtype | None, hub_folder: HubFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (meta_model(read_config(hub_folder(name))) for _ in range(2))
    runtime.load(one, hub_folder(name), dtype=dtype)
    with as_if_on_a_gpu(monkeypatch) as workers:
        runtime.load(other, hub_folder(name), dtype=dtype, threads=3)
    assert len(workers) == 3
    assert not differing(local_tensors(other), local_tensors(one))


def test_where_a_read_fails_no_copy_is_left_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "short"
    file.write_bytes(bytes(64))
    work = [(Read(file, start, start + 64, (StridedCopy(0, start, 0, start, 64),)),) for start in (0, 64)]
    targets = {0: transfer.build_target(torch.zeros(128, dtype=torch.uint8), torch.uint8)}
    with as_if_on_a_gpu(monkeypatch):
        waited: list[bool] = []
        stream = torch.cuda.Stream(torch.device("cpu"))
        stream.synchronize = lambda: waited.append(True)
        with pytest.raises(IncompleteError, match="short"):
            transfer.run_workers(work, 1, lambda: CudaWorker(targets, torch.device("cpu"), stream))
    assert waited == [True]


@contextmanager
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CudaWorker]]:
    """Let the workers for GPUs bring tensors to this machine's memory, through small buffers."""
    workers: list[CudaWorker] = []
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "set_device", lambda device: None)
        patched.setattr(torch.cuda, "Stream", lambda device: stream)
        patched.setattr(torch.cuda, "Event", lambda: event)
        patched.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
        patched.setattr(transfer, "_allocate_pinned", lambda size: torch.full((size,), 77, dtype=torch.uint8))
        patched.setattr(transfer, "BUFFER_BYTES", 4 * KIB)
        patched.setattr(transfer, "_make_alone_predicate", lambda targets, device: together)

        def worker(targets: transfer.Targets, device: torch.device) -> Callable[[], CudaWorker]:
            def made() -> CudaWorker:
                workers.append(CudaWorker(targets, device, stream))
                return workers[-1]

            return made

        patched.setattr(transfer, "_make_worker_factory", worker)
        yield workers


def test_devices_that_are_not_read_to_are_refused(hub_folder: HubFolder) -> None:
    model = meta_model(read_config(hub_folder("llama")))
    with pytest.raises(UsageError, match="tensors on meta cannot be loaded"):
        runtime.load(model, hub_folder("llama"), device="meta")
