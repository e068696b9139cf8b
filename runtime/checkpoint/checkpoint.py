"""What a checkpoint holds, whatever its layout: tensors by their names in the model, over what its files store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.files.side_files import SideFiles
from runtime.checkpoint.record import StoredForm, TensorKind
from runtime.tensor_map.tensor_map import TensorMap

__all__ = ["Checkpoint", "KeyPath", "Layout", "OptimizerState", "SourceLayout", "TensorInfo"]

Layout = Literal["hf", "dcp", "ranks"]
"""Those that are written."""

KeyPath = tuple[str | int, ...]

SourceLayout = Layout | Literal["foreign"]
"""Those that are read."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A whole tensor that a checkpoint holds.

    Args:
        kind: `carried` tensors are those that the model has no parameter for.
        dtype: safetensors' name.
        shape: of the whole tensor.
    """

    kind: TensorKind
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's checkpoint read up to its headers.

    Args:
        folder: where it lies in the model's folder, `.` for the folder itself.
        tensors: by saved name; `parameter` for those that are laid out like their parameter, else `carried`.
        parameters: the name of each such tensor's parameter, by saved name.
        tensor_maps: of the tensors over the pieces.
        chunks: what files store.
        values: pickles of what is no tensor, by saved name; read as data and found to be nothing else.
        paths: keys of the nested tables that lead to what is saved, by its name.
        stateless: parameters of the model that have no state, frozen ones say.
    """

    folder: str
    tensors: Mapping[str, TensorInfo]
    parameters: Mapping[str, str]
    tensor_maps: Mapping[str, TensorMap] = field(repr=False)
    chunks: Mapping[str, StoredTensor] = field(repr=False)
    values: Mapping[str, bytes] = field(repr=False)
    paths: Mapping[str, KeyPath] = field(repr=False)
    stateless: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read up to its headers, no tensor touched.

    Args:
        folder: where it lies.
        layout: how it lies there.
        tensors: by name in the model, carried ones by stored name; tied names are left out.
        tied: other names of tensors, each with the name that holds the bytes.
        tensor_maps: of the tensors over the pieces.
        chunks: what files store, by names of this layout's own.
        side_files: the other files.
        stored_form: of the hub form that it once came from, where that is known.
        digests: of tensors, where the checkpoint records them.
        config: what config.json said when the checkpoint was laid out, where it records that.
        optimizer: the state of the optimizer that trained them, where it goes along.
        extra_files: other files that go along although they do not lie in the folder, by name.
    """

    folder: Path
    layout: SourceLayout
    tensors: Mapping[str, TensorInfo]
    tied: Mapping[str, str]
    tensor_maps: Mapping[str, TensorMap] = field(repr=False)
    chunks: Mapping[str, StoredTensor] = field(repr=False)
    side_files: SideFiles
    stored_form: StoredForm | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, object] | None = field(default=None, repr=False)
    optimizer: OptimizerState | None = None
    extra_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def all_tensors(self) -> dict[str, TensorInfo]:
        """The tensors, and those of the optimizer by the names they are saved under."""
        return {**self.tensors, **(self.optimizer.tensors if self.optimizer else {})}

    @property
    def all_tensor_maps(self) -> dict[str, TensorMap]:
        """The forms, and those of the optimizer's tensors."""
        return {**self.tensor_maps, **(self.optimizer.tensor_maps if self.optimizer else {})}

    @property
    def all_chunks(self) -> dict[str, StoredTensor]:
        """The pieces, and those of the optimizer's tensors."""
        return {**self.chunks, **(self.optimizer.chunks if self.optimizer else {})}
