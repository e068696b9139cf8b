"""Execution: bytes arrive where the forms say, whatever the slab size, in destinations and digests alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from plans.errors import CheckpointError, UsageError
from runtime.checkpoint import copy, extents
from runtime.checkpoint.copy import Destination, build_table, execute
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.extents import Form, whole
from runtime.checkpoint.safetensors import read_header
from runtime.checkpoint.writing import file_sink


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


def fused() -> tuple[Form, Callable[[dict[str, torch.Tensor]], torch.Tensor]]:
    pair = [whole("a", (12, 10)), whole("b", (12, 10))]
    return extents.concatenate(pair, 1), lambda t: torch.cat([t["a"], t["b"]], 1)


CASES: dict[str, tuple[Form, Callable[[dict[str, torch.Tensor]], torch.Tensor]]] = {
    "whole": (whole("a", (12, 10)), lambda t: t["a"]),
    "rows": (extents.narrow(whole("byte", (7, 9)), 0, 2, 4), lambda t: t["byte"][2:6]),
    "columns": (extents.narrow(whole("long", (5, 6)), 1, 1, 3), lambda t: t["long"][:, 1:4]),
    "odd columns": (extents.narrow(whole("byte", (7, 9)), 1, 2, 5), lambda t: t["byte"][:, 2:7]),
    "transposed": (extents.transpose(whole("a", (12, 10)), 0, 1), lambda t: t["a"].T),
    "joined columns": fused(),
    "stacked": (
        extents.stack([whole("a", (12, 10)), whole("b", (12, 10))], 1),
        lambda t: torch.stack([t["a"], t["b"]], 1),
    ),
    "empty": (extents.narrow(whole("a", (12, 10)), 0, 12, 0), lambda t: t["a"][12:]),
}


@given(slab=st.integers(1, 300), case=st.sampled_from(sorted(CASES)))
def test_every_slab_size_gives_the_same_bytes(
    stored: tuple[Path, dict[str, torch.Tensor]], slab: int, case: str
) -> None:
    file, tensors = stored
    form, build = CASES[case]
    expected = build(tensors).contiguous().reshape(-1).view(torch.uint8).numpy()
    result, digest = np.zeros(expected.size, np.uint8), Digest()

    def keep(offset: int, piece: copy.Bytes) -> None:
        result[offset : offset + len(piece)] += piece

    wanted = [(Destination(case, expected.size, "x"), form), (Destination(case, expected.size), form)]
    table = build_table(read_header(file).tensors, wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy, "_SLAB", slab)
        execute(table, [keep, digest.add])
    once = Digest()
    once.add(0, expected)
    assert (result == expected).all()
    assert str(digest) == str(once)


def test_short_reads_and_writes_are_continued(
    stored: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tensors = stored
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr("os.pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    monkeypatch.setattr("os.preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:5]], offset))
    with (tmp_path / "out").open("wb") as stream:
        table = build_table(read_header(file).tensors, [(Destination("a", 240, "out", 3), whole("a", (12, 10)))])
        assert execute(table, [file_sink(stream.fileno(), 3)]) == 240
    expected = tensors["a"].view(torch.uint8).numpy().tobytes()
    assert (tmp_path / "out").read_bytes() == b"\0\0\0" + expected


def test_a_failing_disk_is_one_clear_error(
    stored: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    table = build_table(read_header(stored[0]).tensors, [(Destination("a", 240), whole("a", (12, 10)))])
    monkeypatch.setattr("os.preadv", fail)
    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        execute(table, [Digest().add])
    assert str(stored[0]) in caught.value.message


def test_a_failing_digest_stops_the_copy(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    def fail(offset: int, piece: copy.Bytes) -> None:
        raise ArithmeticError

    table = build_table(read_header(stored[0]).tensors, [(Destination("a", 240), whole("a", (12, 10)))])
    with pytest.raises(ArithmeticError):
        execute(table, [fail])


def test_too_little_memory_is_refused(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    table = build_table(read_header(stored[0]).tensors, [(Destination("a", 240), whole("a", (12, 10)))])
    with pytest.raises(UsageError, match="too little memory"):
        execute(table, [Digest().add], max_memory=1000)
