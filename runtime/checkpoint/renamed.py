"""Checkpoints that another release of transformers wrote, where that release has other names or sizes for the model.

Only folders with a manifest are concerned: hub form has names of its own, which every release converts. A recorded name
that the model does not have is read under the one that transformers' conversion mapping gives it, as transformers does
when it loads weights that an older release saved; but only if every tensor of the model is found that way, with its
kind and shape. In all other cases the error tells which release wrote the folder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import IncompleteError, MigratorError, MismatchError
from plans.text import format_names
from runtime.checkpoint.hub.conversion import rename
from runtime.checkpoint.manifest import Manifest, rename_tensors
from runtime.models.config import transformers_version
from runtime.models.model import find_tied_names, model_tensors, tensor_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["find_other_release", "use_model_names"]


def find_other_release(manifest: Manifest | None) -> str | None:
    """Return the release of transformers that wrote a checkpoint, None if it is the installed one or not recorded."""
    release = manifest.written_by.get("transformers") if manifest is not None else None
    return release if release != transformers_version() else None


def use_model_names(manifest: Manifest, model: PreTrainedModel, folder: Path) -> Manifest:
    """Return a manifest with the names that the model has for its tensors.

    Args:
        manifest: the checkpoint's manifest.
        model: the model, on any device.
        folder: the checkpoint's folder.

    Returns:
        The same manifest, unless another release wrote it and has other names.

    Raises:
        IncompleteError: another release wrote it, and the model has tensors that it does not record.
        MismatchError: another release wrote it, and records tensors that the model does not have, or has otherwise.
    """
    release = find_other_release(manifest)
    if release is None:
        return manifest
    tied = find_tied_names(model)
    tensors = model_tensors(model)
    names = _find_names(manifest, model, tensors.keys())
    if names:
        manifest = rename_tensors(manifest, names)
    expected = {name: (tensor_kind(row), tuple(row.shape)) for name, row in tensors.items() if name not in tied}
    recorded = {
        name: (entry.kind, entry.shape)
        for name, entry in manifest.tensors.items()
        if entry.kind != "carried" or name in expected
    }
    if recorded != expected:
        raise _build_error(release, folder, recorded, expected)
    return manifest


def _find_names(manifest: Manifest, model: PreTrainedModel, expected: Collection[str]) -> Mapping[str, str]:
    """Return the model's name of each recorded one that it does not have, empty unless there is one for all of them."""
    recorded = {name for name, entry in manifest.tensors.items() if entry.kind != "carried"} | manifest.tied.keys()
    unknown = [name for name in recorded if name not in expected]
    names = rename(model, unknown)
    is_complete = len(names) == len(unknown) and not recorded & set(names.values())
    return names if is_complete else {}


def _build_error(
    release: str,
    folder: Path,
    recorded: Mapping[str, tuple[str, tuple[int, ...]]],
    expected: Mapping[str, tuple[str, tuple[int, ...]]],
) -> MigratorError:
    who = f"transformers {release} wrote the folder, and {transformers_version()} is installed"
    hint = (
        f"the names or sizes may have changed between these releases: with transformers {release}, reshard it to "
        "`layout=hf`, which every release reads; if config.json was edited, restore it"
    )
    missing = [name for name in expected if name not in recorded]
    surplus = [name for name in recorded if name not in expected]
    if missing:
        instead = f", but {format_names(surplus)}" if surplus else ""
        return IncompleteError(
            f"{folder}: not stored are the model's {format_names(missing)}{instead}; {who}",
            hint=hint,
            missing=missing,
            stored=surplus,
            written_by=release,
        )
    if surplus:
        what = f"stores {format_names(surplus)}, which the model does not have"
        return MismatchError(f"{folder}: {what}; {who}", hint=hint, tensors=surplus, written_by=release)
    name = next(name for name in expected if recorded[name] != expected[name])
    (kind, shape), (stored_kind, stored_shape) = expected[name], recorded[name]
    what = f"{name} is a {kind} of {list(shape)} in the model but a {stored_kind} of {list(stored_shape)} in the folder"
    return MismatchError(f"{folder}: {what}; {who}", hint=hint, name=name, written_by=release)
