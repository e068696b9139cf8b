"""Reading an optimizer's checkpoint beside a model's: `.distcp` files with fully qualified names.

Source: `save_optimizer_distributed` of transformers 5.23; `get_optimizer_state_dict` of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from plans.errors import CheckpointError, ConversionError, MismatchError
from runtime.checkpoint.content import Checkpoint, TensorInfo
from runtime.checkpoint.dcp.chunks import Shape, join_chunks
from runtime.checkpoint.dcp.metadata import DcpMetadata, read_metadata
from runtime.checkpoint.dcp.names import METADATA
from runtime.checkpoint.dcp.storage import read_chunks
from runtime.checkpoint.files.safetensors import find_dtypes
from runtime.checkpoint.optimizer.checks import check_listed_keys, check_states_complete
from runtime.checkpoint.optimizer.state import OptimizerState, SavedName, find_prefix, split_name
from runtime.checkpoint.optimizer.values import read_values
from runtime.wording import format_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OptimizerCheckpoint", "find_optimizer", "read_optimizer"]

_SUFFIX = ".distcp"


@dataclass(frozen=True)
class OptimizerCheckpoint:
    """The metadata of an optimizer's checkpoint.

    Args:
        folder: where it lies in the model's folder, `.` for the folder itself.
        metadata: what the metadata list.
        prefix: what stands before all names.
        files: all of this kind in the folder, relative to the model's; those of an earlier save, which the metadata do
            not name, would be in the way of those that are written.
    """

    folder: str
    metadata: DcpMetadata
    prefix: str
    files: frozenset[str]

    @property
    def current_files(self) -> frozenset[str]:
        """The files that the metadata name, and their own."""
        return frozenset(str(PurePosixPath(self.folder) / name) for name in (METADATA, *self.metadata.files))


def find_optimizer(checkpoint: Checkpoint) -> OptimizerCheckpoint | None:
    """Return where an optimizer's state lies among a checkpoint's side files, None where there is none.

    Raises:
        HeaderError: metadata lie.
        CheckpointError: there are several.
    """
    places = [
        PurePosixPath(name).parent for name in checkpoint.side_files.copied if PurePosixPath(name).name == METADATA
    ]
    found = [one for place in places if (one := _find_in_folder(checkpoint, place)) is not None]
    if len(found) > 1:
        raise CheckpointError(
            f"{checkpoint.folder}: holds the state of several optimizers, in {format_names([one.folder for one in found])}",
            hint="keep the one that goes with the weights, and move the others away",
            folders=[one.folder for one in found],
        )
    return found[0] if found else None


def read_optimizer(checkpoint: Checkpoint, optimizer: OptimizerCheckpoint, model: PreTrainedModel) -> OptimizerState:
    """Read an optimizer's state, no tensor.

    Args:
        checkpoint: of the model's checkpoint.
        optimizer: the optimizer's metadata.
        model: that both are of, on meta.

    Raises:
        MismatchError: it is of another model.
        ConversionError: a tensor has neither its parameter's shape nor one element.
        IncompleteError: a file, a state or part of one is missing.
        HeaderError: metadata or archives lie, or a hyperparameter is no plain value.
        CheckpointError: a link leads out of the folder.
    """
    folder = checkpoint.folder / optimizer.folder
    shapes = {name: tuple(row.shape) for name, row in model.named_parameters(remove_duplicate=False)}
    names = _split_names(optimizer, shapes, folder)
    check_listed_keys(
        [name for name in optimizer.metadata.key_paths if name.startswith(optimizer.prefix)], names, folder
    )
    parameters = dict(_match_shapes(names, optimizer.metadata.shapes, shapes, folder))
    values = read_values(folder, optimizer.metadata.non_tensors)
    check_states_complete(names, values, shapes, folder)
    chunks = [
        replace(chunk, stored_name=f"optimizer/{chunk.stored_name}")
        for chunk in read_chunks(folder, optimizer.metadata.chunks)
    ]
    forms, dtypes = (
        join_chunks(chunks, optimizer.metadata.shapes),
        find_dtypes((chunk.name, chunk.stored) for chunk in chunks),
    )
    with_state = {row.parameter for row in names.values() if row.section == "state"}
    return OptimizerState(
        folder=optimizer.folder,
        tensors={
            name: TensorInfo("parameter" if name in parameters else "carried", dtypes[name], form.shape)
            for name, form in forms.items()
        },
        parameters=parameters,
        tensor_maps=forms,
        chunks={chunk.stored_name: chunk.stored for chunk in chunks},
        values=values,
        paths={name: path for name, path in optimizer.metadata.key_paths.items() if name in names},
        stateless=tuple(name for name, _ in model.named_parameters() if name not in with_state),
    )


def _find_in_folder(checkpoint: Checkpoint, folder: PurePosixPath) -> OptimizerCheckpoint | None:
    saved = read_metadata(checkpoint.folder / folder)
    prefix = find_prefix([*saved.shapes, *saved.non_tensors])
    if prefix is None:
        return None
    beside = (name for name in checkpoint.side_files.copied if PurePosixPath(name).parent == folder)
    files = (name for name in beside if name.endswith((METADATA, _SUFFIX)))
    return OptimizerCheckpoint(str(folder), saved, prefix, frozenset(files))


def _split_names(optimizer: OptimizerCheckpoint, parameters: Mapping[str, Shape], folder: Path) -> dict[str, SavedName]:
    """Return the parts of every saved name."""
    names = [*optimizer.metadata.shapes, *optimizer.metadata.non_tensors]
    parts = {name: _split_prefixed_name(name, optimizer.prefix, parameters) for name in names}
    strange = [name for name, row in parts.items() if row is None]
    if strange:
        raise MismatchError(
            f"{folder / METADATA}: {format_names(strange)} belong to no parameter of the model",
            hint="the optimizer's state is of another model; save it beside the weights it was trained with",
            names=strange,
        )
    return {name: row for name, row in parts.items() if row is not None}


def _split_prefixed_name(name: str, prefix: str, parameters: Mapping[str, Shape]) -> SavedName | None:
    return split_name(name.removeprefix(prefix), parameters) if name.startswith(prefix) else None


def _match_shapes(
    names: Mapping[str, SavedName], stored: Mapping[str, Shape], parameters: Mapping[str, Shape], folder: Path
) -> Iterator[tuple[str, str]]:
    """Yield each state that has its parameter's shape, with that parameter; others must be single elements."""
    for name, shape in stored.items():
        parameter = names[name].parameter if names[name].section == "state" else None
        if parameter is not None and shape == parameters[parameter]:
            yield name, parameter
        elif prod(shape) != 1:
            raise ConversionError(
                f"{folder / METADATA}: {name} is {list(shape)}, neither one element nor as large as its parameter"
                + (f", {list(parameters[parameter])}" if parameter is not None else ""),
                hint="it is of another model, or of an optimizer whose state is not laid out like its parameters, "
                "which cannot be resharded: leave it out with --no-optimizer",
                name=name,
                shape=list(shape),
            )
