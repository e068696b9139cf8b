"""What one torch writes and another one reads: run as a program by Pythons that have torch, safetensors and numpy only.

`python -m tests.runtime.checkpoint.dcp.torch_exchange write FOLDER`, and the same with `read` or `lossy HUB FOLDER`.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from runtime.checkpoint.checkpoint import TensorInfo
from runtime.checkpoint.dcp.chunks import Chunk, join_chunks
from runtime.checkpoint.dcp.metadata import StorageLocation, read_metadata
from runtime.checkpoint.dcp.storage import read_chunks
from runtime.checkpoint.files.file_names import METADATA
from runtime.checkpoint.optimizer.archive import build_tensor_archive, build_value_archive
from runtime.checkpoint.optimizer.writer import SavedChunk, encode_metadata
from runtime.models.dtypes import DTYPES, dtype_name

__all__ = ["FORMS", "PIECES", "Pieces", "cut", "save_lossy"]

PIECES = {"in order": (0, 1, 2, 3), "backwards": (3, 2, 1, 0)}
"""The orders in which a rank may hold the quarters of a tensor."""
FORMS = {
    "shards": {"save_distributed": True},
    "whole": {},
    "consolidated": {"save_distributed": True, "enable_consolidation": True},
}
"""The ways in which torch's writer saves safetensors files."""


class Pieces(torch.Tensor):
    """Several chunks of a tensor in the memory of one rank, with the methods of torch's `_Checkpointable`."""

    starts: tuple[int, ...]
    whole_shape: torch.Size

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(torch.empty(0, dtype=self.dtype))
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets, number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.whole_shape),
            )
            for number, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        size = torch.Size((len(self) // len(self.starts), *self.shape[1:]))
        return [ChunkStorageMetadata(torch.Size((start, *[0] * (self.ndim - 1))), size) for start in self.starts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        number, rows = self.starts.index(index.offset[0]), len(self) // len(self.starts)
        return self.as_subclass(torch.Tensor)[number * rows : (number + 1) * rows]


def cut(tensor: torch.Tensor, order: Sequence[int], *, protocol: bool = False) -> torch.Tensor:
    """Return a tensor's quarters in another order, as an object with methods or by torch's protocol (since 2.14)."""
    rows = len(tensor) // len(order)
    starts = tuple(part * rows for part in order)
    local = torch.cat([tensor[start : start + rows] for start in starts])
    if not protocol:
        pieces = local.as_subclass(Pieces)
        pieces.starts, pieces.whole_shape = starts, tensor.shape
        return pieces
    rest = (0,) * (tensor.ndim - 1)
    fields = {
        "global_shape": tuple(tensor.shape),
        "global_offsets": tuple((start, *rest) for start in starts),
        "local_offsets": tuple((number * rows, *rest) for number in range(len(order))),
        "local_sizes": ((rows, *tensor.shape[1:]),) * len(order),
    }
    for name, value in fields.items():
        setattr(local, name, value)
    return local


def save_lossy(hub: Path, folder: Path, form: str, order: str, *, protocol: bool = False) -> None:
    """Save a checkpoint with one tensor of several chunks; all but the last of them are lost."""
    state: dict[str, Any] = {name: t for file in hub.glob("*.safetensors") for name, t in load_file(file).items()}
    name = max(state, key=lambda name: state[name].ndim)
    state[name] = cut(state[name], PIECES[order], protocol=protocol)
    arguments: dict[str, Any] = dict(FORMS[form])
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), **arguments), no_dist=True)


def _make_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(8, 6),
        "b.weight": torch.randn(8, 6).to(torch.bfloat16),
        "c.transposed": torch.randn(4, 6).t(),
        "d.scalar": torch.tensor(2.5, dtype=torch.float64),
        "e.numbers": torch.arange(7),
        "f.small": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "g.flags": torch.tensor([True, False, True]),
    }


def _write(folder: Path) -> None:
    state = _make_state()
    dcp.save({"model": state, "step": 3}, checkpoint_id=folder / "torch", no_dist=True)
    dcp.save({"model": {"a.weight": cut(state["a.weight"], PIECES["backwards"])}}, checkpoint_id=folder / "pieces")
    _write_ours(folder / "ours", state)
    (folder / "fields").write_text(str(_count_fields()))


def _count_fields() -> int:
    """Return how many fields this torch pickles of `TensorProperties`."""
    return len(TensorProperties().__getstate__())  # type: ignore[no-untyped-call]


def _write_ours(folder: Path, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    infos = {f"model.{name}": TensorInfo("parameter", dtype_name(t.dtype), tuple(t.shape)) for name, t in state.items()}
    chunks: dict[str, list[SavedChunk]] = {}
    with (folder / "__0_0.distcp").open("wb") as stream:

        def add(content: bytes) -> StorageLocation:
            stream.write(content)
            return StorageLocation("__0_0.distcp", stream.tell() - len(content), len(content))

        for name, tensor in state.items():
            halves = tensor.chunk(2) if tensor.ndim == 2 else (tensor,)
            rows = 0
            for half in halves:
                archive = build_tensor_archive(dtype_name(half.dtype), tuple(half.shape))
                content = half.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                offset = (rows, *[0] * (half.ndim - 1)) if half.ndim else ()
                place = add(archive.head + content + archive.tail)
                chunks.setdefault(f"model.{name}", []).append(SavedChunk(offset, tuple(half.shape), place))
                rows += len(half) if half.ndim else 0
        values = {"step": add(build_value_archive(pickle.dumps(3, protocol=2)))}
    paths = {name: ("model", name.removeprefix("model.")) for name in infos} | {"step": ("step",)}
    (folder / METADATA).write_bytes(encode_metadata(infos, chunks, values, paths))


def _read(folder: Path) -> None:
    expected = _make_state()
    is_newer = int((folder / "fields").read_text()) > _count_fields()
    for name in ("torch", "ours", "pieces"):
        wanted = {key: tensor for key, tensor in expected.items() if name != "pieces" or key == "a.weight"}
        state: dict[str, Any] = {"model": {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}}
        if name == "ours" or not is_newer:  # what torch 2.15 writes itself, older releases cannot read
            dcp.load(state, checkpoint_id=folder / name, no_dist=True)
            _compare(state["model"], wanted, f"torch reads {name}")
        found = {key.removeprefix("model."): tensor for key, tensor in _read_ours(folder / name).items()}
        _compare(found, wanted, f"we read {name}")


def _read_ours(folder: Path) -> dict[str, torch.Tensor]:
    metadata = read_metadata(folder)
    chunks = read_chunks(folder, metadata.chunks)
    join_chunks(chunks, metadata.shapes)
    tensors: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        dtype = DTYPES[chunk.stored.dtype]
        whole = tensors.setdefault(chunk.name, torch.zeros(metadata.shapes[chunk.name], dtype=dtype))
        box = tuple(slice(start, start + size) for start, size in zip(chunk.offset, chunk.shape, strict=True))
        whole[box] = _read_chunk(chunk, dtype)
    return tensors


def _read_chunk(chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
    with chunk.stored.file.open("rb") as stream:
        stream.seek(chunk.stored.offset)
        content = bytearray(stream.read(chunk.stored.size))
    return torch.frombuffer(content, dtype=dtype).as_strided(chunk.shape, chunk.strides, chunk.base)


def _compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, tensor in expected.items():
        one, other = (each.contiguous().reshape(-1).view(torch.uint8) for each in (found[name], tensor))
        assert found[name].dtype == tensor.dtype, (what, name)
        assert torch.equal(one, other), (what, name)


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[2:]]
    match sys.argv[1]:
        case "write":
            _write(*folders)
        case "read":
            _read(*folders)
        case "lossy":
            for form in FORMS:
                for order in PIECES:
                    save_lossy(folders[0], folders[1] / f"{form} {order}", form, order, protocol=True)
