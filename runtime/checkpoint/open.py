"""The one way into a checkpoint of any layout: `open_checkpoint`, which finds the layout, the manifest and the model.

Nothing outside of this module decides by the layout how a checkpoint is read, or whether that takes a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from plans.errors import ConversionError, IncompleteError, MismatchError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint, SourceLayout, TensorInfo
from runtime.checkpoint.dcp.reader import read_dcp_checkpoint
from runtime.checkpoint.external.reader import read_external
from runtime.checkpoint.external.source import ExternalSettings, SeparateConfig, SourceSettings
from runtime.checkpoint.files.file_names import CONFIG, INDEX, MANIFEST, METADATA, WEIGHTS, find_shard_files
from runtime.checkpoint.files.job_folders import find_config_folder, find_weights_folder
from runtime.checkpoint.files.reading import convert_read_errors
from runtime.checkpoint.files.remote import get_origin
from runtime.checkpoint.files.side_files import LeftBehind, SideFiles
from runtime.checkpoint.fsdp.optimizer import find_rank_optimizer, read_rank_optimizer
from runtime.checkpoint.fsdp.reader import has_rank_files, read_fsdp_checkpoint
from runtime.checkpoint.hub.files import check_has_weights
from runtime.checkpoint.hub.reader import read_hub_checkpoint
from runtime.checkpoint.manifest import Manifest, find_manifest
from runtime.checkpoint.optimizer.reader import OptimizerCheckpoint, find_optimizer, read_optimizer
from runtime.checkpoint.ranks.files import read_rank_checkpoint
from runtime.checkpoint.renamed import find_other_release, use_model_names
from runtime.formats import recognize_folder
from runtime.models.config import read_config
from runtime.models.model import find_tied_names, model_tensors, tensor_kind
from runtime.models.quantized import build_stored_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["CheckpointReader", "OptimizerChoice", "detect_layout", "open_checkpoint"]

OptimizerChoice = Literal["ignore", "leave", "include", "require"]
"""What to do with an optimizer's state beside the model: treat its files as any others, leave them behind, read the
state if there is one, or fail if there is none.
"""

_CONFIG_HINT = "config.json does not belong to these weights; restore the one that they were saved with"


def detect_layout(folder: Path) -> SourceLayout:
    """Return the layout of a checkpoint by the names of its files; hub form if they do not tell."""
    with convert_read_errors(folder):
        if folder.is_dir() and find_shard_files(folder):
            return "dcp"
    if (folder / MANIFEST).is_file():
        return "ranks"
    is_hub = any((folder / name).exists() for name in (WEIGHTS, INDEX))
    if not is_hub and has_rank_files(folder):
        return "fsdp"
    if is_hub:
        return "hf"
    return "dcp" if (folder / METADATA).is_file() or find_weights_folder(folder) != folder else "hf"


def open_checkpoint(folder: Path, external: SourceSettings | None = None) -> CheckpointReader:
    """Open a checkpoint of any layout. Only its manifest is read, if it has one.

    Args:
        folder: the checkpoint's folder.
        external: how to read the folder if it contains another stack's rank files, or a config to read it with.

    Raises:
        HeaderError: the manifest is damaged.
        IncompleteError: the folder is of another format, or contains no weights.
        CheckpointError: the folder cannot be read.
    """
    if isinstance(external, ExternalSettings):
        return CheckpointReader(folder, "foreign", None, external, external.config)
    layout = detect_layout(folder)
    weights = find_weights_folder(folder) if layout == "dcp" else folder
    _check_format(weights, layout)
    return CheckpointReader(folder, layout, find_manifest(folder), config_file=external, weights=weights)


def _check_format(folder: Path, layout: SourceLayout) -> None:
    """Refuse a folder of another format before its config is asked for, which such a folder may not have."""
    if layout == "hf":
        check_has_weights(folder)
        return
    has_only_metadata = layout == "dcp" and not (folder / MANIFEST).is_file() and not find_shard_files(folder)
    recognized = recognize_folder(folder, of_metadata=True) if has_only_metadata else None
    if recognized is not None:
        raise recognized.build_error(folder)


@dataclass(frozen=True)
class CheckpointReader:
    """An opened checkpoint. The model that its config describes is built when it is first needed.

    Args:
        folder: the checkpoint's folder.
        layout: the layout of its files.
        manifest: its manifest, None if it has none.
        external: how to read another stack's rank files, None for all other layouts.
        config_file: the config.json that the user named, None for the checkpoint's own.
        weights: the folder of the weights if they are in a folder below.
    """

    folder: Path
    layout: SourceLayout
    manifest: Manifest | None
    external: ExternalSettings | None = None
    config_file: SeparateConfig | None = None
    weights: Path | None = None

    @property
    def is_self_describing(self) -> bool:
        """Whether manifest and headers describe every tensor, so that no model is needed to read them."""
        return self.layout == "ranks"

    @property
    def config_folder(self) -> Path:
        """The folder of config.json."""
        return self.separate_config.folder if self.separate_config else find_config_folder(self.folder)

    @cached_property
    def separate_config(self) -> SeparateConfig | None:
        """The config.json that goes along with the checkpoint although it is not in its folder, None if there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        if self.config_file is not None:
            return self.config_file
        found = find_config_folder(self.folder)
        return None if found.is_relative_to(self.folder) or self.is_self_describing else SeparateConfig.read(found)

    def list_notes(self) -> Iterator[str]:
        """Yield what was found elsewhere than in the folder itself."""
        if (origin := get_origin(self.folder)) is not None:
            yield f"the source is {origin}"
        if self.weights is not None and self.weights != self.folder:
            yield f"the weights are those of {self.weights.relative_to(self.folder)}"
        if self.separate_config is not None:
            folder = self.separate_config.folder
            yield f"{CONFIG} is that of {get_origin(folder) or folder}"

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's config.

        Raises:
            CheckpointError: it is missing or cannot be read.
        """
        return read_config(self.config_folder)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on meta, its parameters in the form that a checkpoint stores them in.

        Raises:
            CheckpointError: the config does not describe a model.
            UsageError: the model is quantized in an unsupported way.
        """
        return build_stored_model(self.config)

    @property
    def naming_model(self) -> PreTrainedModel | None:
        """The model, if another release of transformers wrote the checkpoint, which may have other names; else None.

        It is also None without a config.json, which only a check of the recorded digests can do without.

        Raises:
            CheckpointError: the config does not describe a model.
        """
        is_needed = find_other_release(self.manifest) is not None and (self.config_folder / CONFIG).is_file()
        return self.model if is_needed else None

    @property
    def model_type(self) -> str:
        """The model's type as the manifest records it, or else as the config names it."""
        return self.manifest.model_type if self.manifest else str(self.config.model_type)

    def read_headers(self, model: PreTrainedModel | None = None, optimizer: OptimizerChoice = "ignore") -> Checkpoint:
        """Read the checkpoint up to its headers. Tensor bytes are read only to compare copies that must be equal.

        The tensors are checked against a model unless the checkpoint is self-describing and no model was given or
        needed for the optimizer's state.

        Args:
            model: the model that the checkpoint must contain, on any device; by default the one of its config.
            optimizer: what to do with an optimizer's state.

        Raises:
            CheckpointError: the checkpoint is damaged, incomplete or of another model, or has several optimizers.
            MismatchError: the tensors are not the model's, or files contradict the manifest or one another.
            ConversionError: a tensor of the optimizer is not sharded like its parameter, or has the parameter's name of
                another release of transformers.
            UsageError: the checkpoint is quantized in an unsupported way.
            PlanError: the plan of another stack's rank files does not fit the model.
        """
        if model is None and not self.is_self_describing:
            model = self.model
        checkpoint = self._add_separate_config(self._read_tensors(model))
        if model is not None:
            _check_matches_model(checkpoint, model)
        if optimizer == "ignore":
            return checkpoint
        if self.layout == "fsdp" and optimizer != "leave" and (files := find_rank_optimizer(self.folder)):
            assert model is not None
            names = {file.name for file in files.values()}
            left_behind = tuple(left for left in checkpoint.side_files.left_behind if left.name not in names)
            return replace(
                checkpoint,
                side_files=SideFiles(checkpoint.side_files.copied, left_behind),
                optimizer=read_rank_optimizer(checkpoint, files, model),
            )
        found = find_optimizer(checkpoint)
        if found is not None and optimizer != "leave":
            _check_not_renamed(checkpoint)
        if found is None:
            _check_no_optimizer(checkpoint, optimizer)
            return checkpoint
        if optimizer == "leave":
            where = f"the optimizer's state in {self.folder / found.folder}"
            note = LeftBehind(where, "which --optimizer takes along", is_file=False)
            return replace(checkpoint, side_files=_drop_optimizer_files(checkpoint.side_files, found, note))
        if model is None:
            model = self.model
            _check_matches_model(checkpoint, model)
        state = read_optimizer(checkpoint, found, model)
        _check_recorded_tensors(checkpoint, state.tensors)
        return replace(checkpoint, side_files=_drop_optimizer_files(checkpoint.side_files, found), optimizer=state)

    def _add_separate_config(self, checkpoint: Checkpoint) -> Checkpoint:
        checkpoint = replace(checkpoint, config_folder=self.config_folder, notes=tuple(self.list_notes()))
        config = self.separate_config
        if config is None:
            return checkpoint
        config.check_unchanged()
        side_files = checkpoint.side_files
        copied = tuple(name for name in side_files.copied if name != CONFIG)
        return replace(
            checkpoint,
            side_files=SideFiles(copied, side_files.left_behind),
            extra_files={**checkpoint.extra_files, CONFIG: config.text},
        )

    def _read_tensors(self, model: PreTrainedModel | None) -> Checkpoint:
        manifest = self.manifest
        if manifest is not None and model is not None:
            manifest = use_model_names(manifest, model, self.folder)
        if self.layout == "ranks":
            assert manifest is not None
            return read_rank_checkpoint(self.folder, manifest)
        assert model is not None
        if self.external is not None:
            return read_external(self.folder, model, self.external)
        if self.layout == "fsdp":
            return read_fsdp_checkpoint(self.folder, model)
        if self.layout == "dcp":
            return read_dcp_checkpoint(self.folder, model, manifest, self.weights)
        return read_hub_checkpoint(self.folder, model)


def _check_not_renamed(checkpoint: Checkpoint) -> None:
    """Refuse an optimizer's state whose parameters have other names in the installed transformers."""
    if checkpoint.manifest is not None and checkpoint.manifest.stored_names:
        release = checkpoint.manifest.written_by["transformers"]
        raise ConversionError(
            f"{checkpoint.folder}: the optimizer's state has the names that transformers {release} has for parameters",
            hint=f"reshard it with transformers {release}, or leave the state out with `optimizer=False`",
            written_by=release,
        )


def _check_matches_model(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse a checkpoint whose tensors are not those of the model; dtypes are the checkpoint's own."""
    tied = find_tied_names(model)
    expected = {name: tensor for name, tensor in model_tensors(model).items() if name not in tied}
    actual = {name: info for name, info in checkpoint.tensors.items() if info.kind != "carried" or name in expected}
    _check_tied(checkpoint.folder, tied, checkpoint.tied)
    if missing := [name for name in expected if name not in actual]:
        raise IncompleteError(
            f"{checkpoint.folder}: the model's {format_names(missing)} are not stored",
            hint=_CONFIG_HINT,
            missing=missing,
        )
    if surplus := [name for name in actual if name not in expected]:
        raise MismatchError(
            f"{checkpoint.folder}: stores {format_names(surplus)}, which the model does not have",
            hint=_CONFIG_HINT,
            tensors=surplus,
        )
    for name, tensor in expected.items():
        pairs = (tensor_kind(tensor), actual[name].kind), (list(tensor.shape), list(actual[name].shape))
        for in_model, stored in pairs:
            if in_model != stored:
                raise MismatchError(
                    f"{checkpoint.folder}: {name} is {in_model} in the model but {stored} in the checkpoint",
                    hint=_CONFIG_HINT,
                    name=name,
                )


def _check_tied(folder: Path, expected: Mapping[str, str], actual: Mapping[str, str]) -> None:
    names: Collection[str] = expected.keys() | actual.keys()
    for name in sorted(names):
        in_model, stored = (f"tied to {ties[name]}" if name in ties else "not tied" for ties in (expected, actual))
        if in_model != stored:
            raise MismatchError(
                f"{folder}: {name} is {in_model} in the model but {stored} in the checkpoint",
                hint=f"{_CONFIG_HINT}; tie_word_embeddings decides which names are tied",
                name=name,
            )


def _check_no_optimizer(checkpoint: Checkpoint, optimizer: OptimizerChoice) -> None:
    """Refuse a checkpoint without an optimizer's state that was written with one, or that must have one."""
    recorded = list(checkpoint.manifest.optimizer) if checkpoint.manifest else []
    if recorded and optimizer != "leave":
        raise IncompleteError(
            f"{checkpoint.folder}: the optimizer's state is missing, but {MANIFEST} records {format_names(recorded)}",
            hint="copy its files again, or leave the state out with `optimizer=False`",
            missing=recorded,
        )
    if optimizer == "require":
        raise IncompleteError(
            f"{checkpoint.folder}: contains no optimizer's state",
            hint="save it there with save_optimizer_distributed, or leave `optimizer` out",
            folder=str(checkpoint.folder),
        )


def _check_recorded_tensors(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse an optimizer's state that is not the one recorded in the manifest, if one is."""
    recorded = checkpoint.manifest.optimizer if checkpoint.manifest else {}
    if differing := sorted(recorded.keys() ^ tensors.keys()) if recorded else []:
        raise MismatchError(
            f"{checkpoint.folder}: the manifest and the optimizer's files differ in {format_names(differing)}",
            hint=f"the optimizer was saved again; move {MANIFEST} out of the folder to read it without its record",
            tensors=differing,
        )


def _drop_optimizer_files(side_files: SideFiles, optimizer: OptimizerCheckpoint, *notes: LeftBehind) -> SideFiles:
    copied = tuple(name for name in side_files.copied if name not in optimizer.files)
    stale = (
        LeftBehind(name, f"which no {METADATA} lists")
        for name in sorted(optimizer.files)
        if name not in optimizer.current_files
    )
    return SideFiles(copied, (*side_files.left_behind, *stale, *notes))
