"""Headers: what safetensors writes is read, what we write safetensors reads, lies are refused."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load_file, save_file

from plans.errors import CheckpointError, HeaderError, IncompleteError, MigratorError
from runtime.checkpoint.files.safetensors import BITS, encode_header, read_header

TENSORS = {
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 3, dtype=torch.int64),
    "bool": torch.tensor([True, False, True]),
    "e4m3": torch.randn(5).to(torch.float8_e4m3fn),
    "e5m2": torch.randn(5).to(torch.float8_e5m2),
    "e8m0": torch.ones(3).to(torch.float8_e8m0fnu),
    "long": torch.tensor([[2**62, -1]]),
    "bf16": torch.randn(3, 2, dtype=torch.bfloat16),
    "complex": torch.randn(2, dtype=torch.complex64),
    "f4": torch.randint(0, 255, (2, 3), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "naïve ☃": torch.zeros(1),
}


def raw(path: Path, entries: object, body: bytes = b"") -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(dtype: str, shape: list[object], start: object, stop: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt", "note": "kept"})
    header = read_header(file)
    content = file.read_bytes()
    assert header.metadata == {"format": "pt", "note": "kept"}
    assert header.tensors.keys() == TENSORS.keys()
    with safe_open(file, "pt") as oracle:
        for name, tensor in header.tensors.items():
            assert list(tensor.shape) == oracle.get_slice(name).get_shape()
            assert tensor.dtype == oracle.get_slice(name).get_dtype()
            expected = TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            assert content[tensor.offset : tensor.offset + tensor.size] == expected


def test_what_we_write_safetensors_reads(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    rows = [("z", "BF16", (3, 5)), ("empty", "F32", (2, 0)), ("scalar", "I64", ()), ("ü", "BOOL", (3,))]
    body = bytes(range(30)) + bytes([7, 0, 0, 0, 0, 0, 0, 0]) + bytes([1, 0, 1])
    content = encode_header(rows, {"format": "pt"}) + body
    file.write_bytes(content)
    assert (len(content) - len(body)) % 8 == 0
    found = load_file(file)
    assert found["scalar"].item() == 7
    assert found["ü"].tolist() == [True, False, True]
    assert found["empty"].shape == (2, 0)
    assert found["z"].view(torch.uint8).reshape(-1).tolist() == list(range(30))
    assert [name for name, _, _ in rows] == list(read_header(file).tensors)
    assert read_header(file).metadata == {"format": "pt"}


LIES: Mapping[str, tuple[object, bytes]] = {
    "no object": ([], b""),
    "no json": (b"{not json", b""),
    "not unicode": (b'{"\xff": 1}', b""),
    "lone surrogate": (b'{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"1"),
    "nested too deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "a huge number": (b'{"a": ' + b"9" * 10_000 + b"}", b""),
    "a name twice": (b'{"a": {}, "a": {}}', b""),
    "a field twice": (b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"1"),
    "no entry": ({"a": 3}, b""),
    "an unknown field": ({"a": entry("U8", [1], 0, 1) | {"more": 1}}, b"1"),
    "an unknown dtype": ({"a": entry("U9", [1], 0, 1)}, b"1"),
    "a negative size": ({"a": entry("U8", [-1], 0, 1)}, b"1"),
    "a size that is no integer": ({"a": entry("U8", [1.0], 0, 1)}, b"1"),
    "a size that is a bool": ({"a": entry("U8", [True], 0, 1)}, b"1"),
    "a size over 2^63": ({"a": entry("U8", [2**63], 0, 2**63)}, b"1"),
    "a product that wraps": ({"a": entry("U8", [2**32, 2**32], 0, 0)}, b""),
    "too many dims": ({"a": entry("U8", [1] * 1000, 0, 1)}, b"1"),
    "backwards": ({"a": entry("U8", [1], 1, 0)}, b"1"),
    "a wrong length": ({"a": entry("U8", [2], 0, 1)}, b"1"),
    "half a byte": ({"a": entry("F4", [3], 0, 1)}, b"1"),
    "a hole": ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"123"),
    "a hole in front": ({"a": entry("U8", [1], 1, 2)}, b"12"),
    "an overlap": ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"),
    "trailing bytes": ({"a": entry("U8", [1], 0, 1)}, b"12"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(lie: str, tmp_path: Path) -> None:
    file = raw(tmp_path / "a.safetensors", *LIES[lie])
    with pytest.raises(HeaderError) as caught:
        read_header(file)
    assert str(file) in caught.value.message
    assert "\n" not in caught.value.message


def test_every_truncation_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(4)}, file)
    content = file.read_bytes()
    for size in range(len(content)):
        file.write_bytes(content[:size])
        with pytest.raises(IncompleteError, match="truncated"):
            read_header(file)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 2**40))
        stream.truncate(2**41)
    with pytest.raises(HeaderError, match="limit"):
        read_header(file)


@given(place=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    file = tmp_path_factory.mktemp("mutated") / "a.safetensors"
    save_file({"a": torch.arange(4), "b": torch.zeros(2, 3), "c": torch.tensor(True)}, file)
    content = bytearray(file.read_bytes())
    content[place % len(content)] = value
    file.write_bytes(content)
    try:
        header = read_header(file)
    except MigratorError:
        return
    assert sum(tensor.size for tensor in header.tensors.values()) <= len(content)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a regular file"):
        read_header(tmp_path / "model.safetensors")


def test_the_dtypes_are_those_of_safetensors() -> None:
    text = json.dumps({"a": entry("?", [1], 0, 1)}).encode()
    with pytest.raises(SafetensorError) as caught:
        deserialize(struct.pack("<Q", len(text)) + text + b"1")
    named = re.findall("`([A-Z0-9_]+)`", str(caught.value))
    assert set(named) <= BITS.keys()
    assert len(named) > 15
