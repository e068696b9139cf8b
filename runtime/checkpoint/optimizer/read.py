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
from runtime.checkpoint.content import Content, Held
from runtime.checkpoint.dcp.chunks import Shape, join
from runtime.checkpoint.dcp.metadata import Saved, read_metadata
from runtime.checkpoint.dcp.names import METADATA
from runtime.checkpoint.dcp.storage import read_chunks
from runtime.checkpoint.files.safetensors import dtypes_of
from runtime.checkpoint.optimizer.checks import check_alike, check_listed
from runtime.checkpoint.optimizer.state import OptimizerState, SavedName, prefix_of, split_name
from runtime.checkpoint.optimizer.values import read_values
from runtime.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FoundOptimizer", "find_optimizer", "read_optimizer"]

_SUFFIX = ".distcp"


@dataclass(frozen=True)
class FoundOptimizer:
    """The metadata of an optimizer's checkpoint.

    Args:
        folder: where it lies in the model's folder, `.` for the folder itself.
        saved: what the metadata list.
        prefix: what stands before all names.
        files: all of this kind in the folder, relative to the model's; those of an earlier save, which the metadata do
            not name, would be in the way of those that are written.
    """

    folder: str
    saved: Saved
    prefix: str
    files: frozenset[str]

    @property
    def used(self) -> frozenset[str]:
        """The files that the metadata name, and their own."""
        return frozenset(str(PurePosixPath(self.folder) / name) for name in (METADATA, *self.saved.files))


def find_optimizer(content: Content) -> FoundOptimizer | None:
    """Return where an optimizer's state lies among a checkpoint's side files, None where there is none.

    Raises:
        HeaderError: metadata lie.
        CheckpointError: there are several.
    """
    places = [PurePosixPath(name).parent for name in content.side.copied if PurePosixPath(name).name == METADATA]
    found = [one for place in places if (one := _found(content, place)) is not None]
    if len(found) > 1:
        raise CheckpointError(
            f"{content.folder}: holds the state of several optimizers, in {listed([one.folder for one in found])}",
            hint="keep the one that goes with the weights, and move the others away",
            folders=[one.folder for one in found],
        )
    return found[0] if found else None


def read_optimizer(content: Content, found: FoundOptimizer, model: PreTrainedModel) -> OptimizerState:
    """Read an optimizer's state, no tensor.

    Args:
        content: of the model's checkpoint.
        found: the optimizer's metadata.
        model: that both are of, on meta.

    Raises:
        MismatchError: it is of another model.
        ConversionError: a tensor has neither its parameter's shape nor one element.
        IncompleteError: a file, a state or part of one is missing.
        HeaderError: metadata or archives lie, or a hyperparameter is no plain value.
        CheckpointError: a link leads out of the folder.
    """
    folder = content.folder / found.folder
    shapes = {name: tuple(row.shape) for name, row in model.named_parameters(remove_duplicate=False)}
    names = _names(found, shapes, folder)
    check_listed([name for name in found.saved.paths if name.startswith(found.prefix)], names, folder)
    parameters = dict(_laid_out_like(names, found.saved.shapes, shapes, folder))
    values = read_values(folder, found.saved.others)
    check_alike(names, values, shapes, folder)
    chunks = [replace(chunk, piece=f"optimizer/{chunk.piece}") for chunk in read_chunks(folder, found.saved.boxes)]
    forms, dtypes = join(chunks, found.saved.shapes), dtypes_of((chunk.name, chunk.stored) for chunk in chunks)
    with_state = {row.parameter for row in names.values() if row.section == "state"}
    return OptimizerState(
        folder=found.folder,
        tensors={
            name: Held("parameter" if name in parameters else "carried", dtypes[name], form.shape)
            for name, form in forms.items()
        },
        parameters=parameters,
        forms=forms,
        pieces={chunk.piece: chunk.stored for chunk in chunks},
        values=values,
        paths={name: path for name, path in found.saved.paths.items() if name in names},
        stateless=tuple(name for name, _ in model.named_parameters() if name not in with_state),
    )


def _found(content: Content, place: PurePosixPath) -> FoundOptimizer | None:
    saved = read_metadata(content.folder / place)
    prefix = prefix_of([*saved.shapes, *saved.others])
    if prefix is None:
        return None
    beside = (name for name in content.side.copied if PurePosixPath(name).parent == place)
    files = (name for name in beside if name.endswith((METADATA, _SUFFIX)))
    return FoundOptimizer(str(place), saved, prefix, frozenset(files))


def _names(found: FoundOptimizer, parameters: Mapping[str, Shape], folder: Path) -> dict[str, SavedName]:
    """Return the parts of every saved name."""
    names = [*found.saved.shapes, *found.saved.others]
    parts = {name: _parts(name, found.prefix, parameters) for name in names}
    strange = [name for name, row in parts.items() if row is None]
    if strange:
        raise MismatchError(
            f"{folder / METADATA}: {listed(strange)} belong to no parameter of the model",
            hint="the optimizer's state is of another model; save it beside the weights it was trained with",
            names=strange,
        )
    return {name: row for name, row in parts.items() if row is not None}


def _parts(name: str, prefix: str, parameters: Mapping[str, Shape]) -> SavedName | None:
    return split_name(name.removeprefix(prefix), parameters) if name.startswith(prefix) else None


def _laid_out_like(
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
