"""The config that a user names by a checkpoint folder, a repository, a config.json or a model type."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import UsageError
from plans.text import first_line, suggest_name
from runtime.checkpoint.files.job_folders import find_config_folder
from runtime.hub import resolve_config_folder
from runtime.models.config import build_unreadable_error, read_config, transformers_version
from runtime.models.model import default_architectures

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["find_config"]


def find_config(source: str) -> PreTrainedConfig:
    """Return the config that a source names.

    Args:
        source: a checkpoint folder, the address of one, such as `hf://owner/name`, the path of a config.json, or a
            model type.

    Raises:
        UsageError: the source is none of these, or the model type's default config is not valid.
        IncompleteError: the folder has no config.json, or it cannot be read.
        CheckpointError: the config is not one of a model type that the installed transformers has, or the repository
            cannot be read.
    """
    from transformers import CONFIG_MAPPING

    if (folder := resolve_config_folder(source) or _find_config_folder(Path(source))) is not None:
        return read_config(folder)
    if source not in CONFIG_MAPPING:
        raise UsageError(
            f"{source}: not a folder, a config.json or a model type of transformers {transformers_version()}",
            hint=suggest_name(source, CONFIG_MAPPING) or "name a folder that save_pretrained wrote, or hf://owner/name",
            source=source,
        )
    return _build_default_config(source)


def _find_config_folder(path: Path) -> Path | None:
    """Return the folder of a config.json that a path names, None if it is neither a folder nor such a file."""
    try:
        if path.is_dir():
            return find_config_folder(path)
    except OSError as error:
        raise build_unreadable_error(path, error) from error
    return path.parent if path.name == "config.json" else None


def _build_default_config(model_type: str) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type](architectures=default_architectures(model_type))
    except Exception as error:  # transformers' config classes may raise anything.
        raise UsageError(
            f"{model_type}: its default config is not valid: {first_line(error)}",
            hint="name a checkpoint folder or a config.json of this model type",
            source=model_type,
        ) from error
    return config
