"""Reading the rank files of FSDP jobs: `model_world_size_8_rank_0.pt` and its fellows, as verl and SkyRL save them.

Every file says of its shards which mesh and placements they have, so neither a plan nor the size of the mesh is asked
for. Where several ranks hold the same shard, as with replicated data parallelism, their bytes must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from plans.errors import ConversionError, IncompleteError, MigratorError, MismatchError
from plans.text import format_names, shorten
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.dcp.chunks import Chunk
from runtime.checkpoint.dcp.reader import build_model_checkpoint
from runtime.checkpoint.dcp.saved import name_chunks
from runtime.checkpoint.files.job_folders import HUGGINGFACE_FOLDER, find_config_folder
from runtime.checkpoint.files.reading import convert_read_errors, read_at_most
from runtime.checkpoint.files.side_files import SideFiles, check_contained, find_side_files
from runtime.checkpoint.fsdp.dtensor import RankTensor, RankTensorParser
from runtime.checkpoint.pickled.pickle import describe_pickle
from runtime.checkpoint.pickled.state_dict import StateDict, get_pairs, open_archive, read_state_dict
from runtime.models.model import find_tied_names, model_tensors
from runtime.tensor_map.tensor_map import Shape, chunk_bounds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["build_rank_chunk", "check_mesh", "find_rank_files", "has_rank_files", "read_fsdp_checkpoint"]

_RANK_FILE = re.compile(r"(model|optim)_world_size_([1-9][0-9]{0,5})_rank_(0|[1-9][0-9]{0,5})\.pt")
_MAX_FILE = 2**26
_SEVERAL = "the files belong to several checkpoints; name a folder with those of one"

_Ranks = Mapping[int, StateDict[RankTensor]]


def has_rank_files(folder: Path) -> bool:
    """Return whether a folder contains rank files of an FSDP job."""
    with convert_read_errors(folder):
        matches = map(_RANK_FILE.fullmatch, (path.name for path in folder.iterdir())) if folder.is_dir() else ()
        return any(match is not None and match[1] == "model" for match in matches)


def read_fsdp_checkpoint(folder: Path, model: PreTrainedModel) -> Checkpoint:
    """Read the rank files of an FSDP job, up to the description of their tensors; replicas are compared byte for byte.

    Args:
        folder: the folder of the files.
        model: the model that its config describes, on meta.

    Raises:
        IncompleteError: a rank's file, or a tensor on a rank, is missing.
        MismatchError: ranks contradict one another or the model, or replicas differ.
        HeaderError: a file is damaged, or contains a tensor that is not read.
        CheckpointError: a file cannot be read, or contains no state dict.
        ConversionError: a tensor is sharded in a way that is not supported.
    """
    files = find_rank_files(folder, "model")
    ranks = {rank: read_state_dict(file, RankTensorParser().parse) for rank, file in files.items()}
    shapes = _check_same_tensors(folder, ranks)
    _check_same_step(folder, list(files))
    for rank, state in ranks.items():
        check_mesh(files[rank], rank, state.tensors.values())
    chunks = [
        build_rank_chunk(files[rank], rank, name, tensor)
        for rank, state in ranks.items()
        for name, tensor in state.tensors.items()
    ]
    tied = find_tied_names(model)
    left_behind = tuple(left for state in ranks.values() for left in state.left_behind)
    names = {file.name for file in files.values()}
    expected = [name for name in model_tensors(model) if name not in tied]
    saved = name_chunks(folder, chunks, shapes, names, left_behind, expected, model)
    side, extra = _find_side_files(folder, names)
    checkpoint = build_model_checkpoint(folder, saved, model, layout="fsdp", side_files=side, extra_files=extra)
    order = dict.fromkeys(chunk.name for chunk in saved.chunks)
    return checkpoint if saved.has_hub_names else replace(checkpoint, saved_order=tuple(order))


def find_rank_files(folder: Path, kind: Literal["model", "optim"]) -> dict[int, Path]:
    """Return the file of every rank, in order; nothing if there are none of this kind.

    Raises:
        IncompleteError: a rank's file is missing.
        MismatchError: there are files of several numbers of ranks.
        CheckpointError: a file is a link that leads out of the folder.
    """
    with convert_read_errors(folder):
        matches = [match for path in folder.iterdir() if (match := _RANK_FILE.fullmatch(path.name))]
    found = [match for match in matches if match[1] == kind]
    worlds = sorted({int(match[2]) for match in found})
    if not worlds:
        return {}
    if len(worlds) > 1:
        raise MismatchError(
            f"{folder}: has rank files of {' and '.join(map(str, worlds))} ranks", hint=_SEVERAL, folder=str(folder)
        )
    files = {int(match[3]): folder / match[0] for match in found}
    absent = [rank for rank in range(worlds[0]) if rank not in files]
    if absent:
        raise IncompleteError(
            f"{folder}: {len(absent)} of {worlds[0]} ranks have no file, the first is rank {absent[0]}",
            hint="copy the missing files; on several machines, each may have saved only its own",
            folder=str(folder),
            rank=absent[0],
        )
    for file in files.values():
        check_contained(folder, file)
    return {rank: files[rank] for rank in range(worlds[0])}


def _check_same_step(folder: Path, ranks: Sequence[int]) -> None:
    """Refuse ranks of different steps, which shards do not tell but the schedulers that verl saves beside them do.

    Source: `verl.utils.checkpoint.fsdp_checkpoint_manager` of verl 0.5.
    """
    files = {rank: folder / f"extra_state_world_size_{len(ranks)}_rank_{rank}.pt" for rank in ranks}
    steps = {rank: step for rank, file in files.items() if file.is_file() and (step := _read_step(file)) is not None}
    first = next(iter(steps), 0)
    for rank, step in steps.items():
        if step != steps[first]:
            raise MismatchError(
                f"{folder}: by their schedulers, rank {first} was saved at step {steps[first]} and rank {rank} at step "
                f"{step}",
                hint=_SEVERAL,
                rank=rank,
            )


def _read_step(file: Path) -> int | None:
    """Return how often the scheduler in a file was called, None if the file does not tell."""
    try:
        with open_archive(file) as archive:
            value = describe_pickle(archive.read_description(), str(file))
    except MigratorError:  # whatever is wrong with it, nothing of it goes along
        return None
    for name in ("lr_scheduler", "last_epoch"):
        value = next((entry for key, entry in get_pairs(value) or () if key == name), None)
    return value if type(value) is int else None


def _check_same_tensors(folder: Path, ranks: _Ranks) -> dict[str, Shape]:
    """Return the shape of every tensor, which all ranks must have under the same names and in the same shape."""
    shapes = {name: tensor.shape for name, tensor in ranks[0].tensors.items()}
    for rank, state in ranks.items():
        if differing := sorted(shapes.keys() ^ state.tensors.keys()):
            raise IncompleteError(
                f"{folder}: ranks 0 and {rank} do not have the same tensors: {format_names(differing)}",
                hint=_SEVERAL,
                rank=rank,
                missing=differing,
            )
        for name, tensor in state.tensors.items():
            if tensor.shape != shapes[name]:
                raise MismatchError(
                    f"{folder}: {shorten(repr(name))} is {list(shapes[name])} on rank 0 but {list(tensor.shape)} on "
                    f"rank {rank}",
                    hint=_SEVERAL,
                    name=name,
                )
            if (other := _describe_split(tensor)) != (first := _describe_split(ranks[0].tensors[name])):
                raise MismatchError(
                    f"{folder}: {shorten(repr(name))} is {first} on rank 0 but {other} on rank {rank}",
                    hint=_SEVERAL,
                    name=name,
                )
    return shapes


def _describe_split(tensor: RankTensor) -> str:
    """Return in words how a tensor is split, which all ranks must say alike; replicas may have meshes of their own."""
    if tensor.mesh is None:
        return "whole"
    dims = ", ".join(
        "replicated" if placement.dim is None else f"dim {placement.dim}" for placement in tensor.placements
    )
    return f"split over a mesh of {' × '.join(map(str, tensor.mesh.sizes))} ({dims})"


def check_mesh(file: Path, rank: int, tensors: Iterable[RankTensor]) -> None:
    """Refuse a file whose shards are those of another rank than its name says.

    Raises:
        MismatchError: the mesh has the rank in another place, or not at all.
    """
    meshes = {id(tensor.mesh): tensor.mesh for tensor in tensors if tensor.mesh is not None}
    for mesh in meshes.values():
        if mesh.find(rank) != mesh.coordinate:
            raise MismatchError(
                f"{file}: does not hold the shards of rank {rank}, by the mesh that it describes",
                hint=_SEVERAL,
                rank=rank,
            )


def build_rank_chunk(file: Path, rank: int, name: str, tensor: RankTensor) -> Chunk:
    """Return the chunk that a rank stores of a tensor.

    Raises:
        MismatchError: the shard has not the shape that its placements give it.
        ConversionError: the tensor is sharded in a way that is not supported.
    """
    offset, shape = _compute_box(file, name, tensor)
    local = tensor.local
    if local.shape != shape:
        found, expected = list(local.shape), list(shape)
        raise MismatchError(
            f"{file}: the shard of {shorten(repr(name))} is {found}, but its placements make it {expected}",
            hint="the file is damaged or was saved by another mesh; copy or save it again",
            name=name,
            rank=rank,
        )
    stored_name = f"{file.name}/{name}"
    if (stored := local.to_stored()) is not None:
        return Chunk.contiguous(name, offset, stored_name, stored)
    return Chunk(name, offset, shape, stored_name, local.storage, local.base, local.strides)


def _compute_box(file: Path, name: str, tensor: RankTensor) -> tuple[Shape, Shape]:
    """Return where a rank's shard lies in its tensor, and its shape."""
    offset, shape = [0] * len(tensor.shape), list(tensor.shape)
    if tensor.mesh is not None:
        sizes = tensor.mesh.sizes
        for axis in _order_axes(file, name, tensor, sizes):
            dim = tensor.placements[axis].dim
            assert dim is not None
            start, shape[dim] = chunk_bounds(shape[dim], sizes[axis], tensor.mesh.coordinate[axis])
            offset[dim] += start
    return tuple(offset), tuple(shape)


def _order_axes(file: Path, name: str, tensor: RankTensor, sizes: Shape) -> Iterator[int]:
    """Yield the axes that shard a tensor, in the order in which they did.

    Axes shard from left to right. FSDP over tensor parallelism is the exception: its axis stands on the left but shards
    what tensor parallelism has left on a rank, which the split factor tells.
    """
    placements = tensor.placements
    late = [axis for axis, placement in enumerate(placements) if placement.split_factor > 1]
    for axis in late:
        after = [other for other in range(axis + 1, len(sizes)) if placements[other].dim == placements[axis].dim]
        is_known = placements[axis].split_factor == prod(sizes[other] for other in after)
        if not is_known or any(other in late for other in after):
            raise ConversionError(
                f"{file}: {shorten(repr(name))} is sharded with a split factor of {placements[axis].split_factor}, "
                "which does not follow from its mesh",
                hint="save the whole model instead, such as with `get_model_state_dict` and `full_state_dict=True`",
                name=name,
            )
    yield from (axis for axis, placement in enumerate(placements) if placement.dim is not None and axis not in late)
    yield from late


def _find_side_files(folder: Path, used: set[str]) -> tuple[SideFiles, dict[str, bytes]]:
    """Return the other files, and by their names in a checkpoint those that verl keeps in a folder of their own."""
    side = find_side_files(folder, used)
    if find_config_folder(folder) != folder / HUGGINGFACE_FOLDER:
        return side, {}
    prefix = f"{HUGGINGFACE_FOLDER}/"
    moved = [name for name in side.copied if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    taken = {name.removeprefix(prefix) for name in moved} & {*side.copied}
    moved = [name for name in moved if name.removeprefix(prefix) not in taken]
    extra = {name.removeprefix(prefix): read_at_most(folder / name, _MAX_FILE) for name in moved}
    return SideFiles(tuple(name for name in side.copied if name not in moved), side.left_behind), extra
