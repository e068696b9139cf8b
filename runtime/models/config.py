"""A checkpoint's config, read by the installed transformers without running the checkpoint's own code."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from plans.errors import CheckpointError, DependencyError, IncompleteError
from plans.text import first_line
from runtime.formats import PREFIX_BYTES, check_not_other_format

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "build_unreadable_error",
    "find_quantization",
    "read_config",
    "remove_quantization",
    "transformers_version",
]


def transformers_version() -> str:
    """Return the installed transformers' version.

    Raises:
        DependencyError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(
            "transformers is not installed", hint="pip install 'plan-migrator[runtime]'", package="transformers"
        ) from error
    return str(transformers.__version__)


def read_config(folder: Path) -> PreTrainedConfig:
    """Read a checkpoint's config.json with the installed transformers, without running the checkpoint's own code.

    Args:
        folder: the checkpoint's folder.

    Raises:
        IncompleteError: there is no config.json, or it cannot be read.
        CheckpointError: the file is not a config of a model type that the installed transformers knows.
    """
    from transformers import AutoConfig

    _check_readable(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers' config classes may raise anything.
        raise CheckpointError(
            f"{folder}/config.json: {first_line(error)}",
            hint=f"correct the entry; transformers {transformers_version()} must have the model type, since code in a "
            "checkpoint is never run",
            folder=str(folder),
        ) from error
    _check_dtype(config, folder)
    # A config may name a kernel repository for its attention or experts, whose code would be downloaded and run.
    # Grouped expert kernels also need widths in multiples of 16 bytes, which a rank's shard may not have.
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def _check_readable(folder: Path) -> None:
    path = folder / "config.json"
    try:
        # Opening a pipe would block until someone writes to it.
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("not a regular file")
        with path.open("rb") as stream:
            check_not_other_format(path, stream.read(PREFIX_BYTES))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IncompleteError(
            f"{folder}: no config.json",
            hint=f"copy the model's config.json there, as `model.config.save_pretrained({str(folder)!r})` writes it",
            folder=str(folder),
        ) from error
    except OSError as error:
        raise build_unreadable_error(path, error) from error


def build_unreadable_error(path: Path, error: OSError) -> IncompleteError:
    """Return the error for a file or folder that exists but cannot be read."""
    return IncompleteError(
        f"{path}: cannot be read: {error.strerror or error}",
        hint="check the path, and the permissions of the file and its folder",
        path=str(path),
    )


def _check_dtype(config: PreTrainedConfig, folder: Path) -> None:
    if not isinstance(config.dtype, torch.dtype | None):
        raise CheckpointError(
            f"{folder}/config.json: {config.dtype!r} is not a dtype of torch {torch.__version__}",
            hint="set `dtype` to the one the weights were saved in, such as bfloat16",
            dtype=str(config.dtype),
        )


def find_quantization(config: PreTrainedConfig) -> tuple[str, Mapping[str, Any]] | None:
    """Return where a config, or one inside it, has quantization settings, and the settings; None if it has none."""
    for where, part in _walk_configs(config, "config.json"):
        settings: Any = getattr(part, "quantization_config", None)
        if settings:
            return where, settings if isinstance(settings, Mapping) else {"quant_method": repr(settings)}
    return None


def remove_quantization(config: PreTrainedConfig) -> None:
    """Make a config that of the unquantized model, which computes with dequantized weights."""
    for _, part in _walk_configs(config, ""):
        if getattr(part, "quantization_config", None):
            del part.quantization_config


def _walk_configs(config: PreTrainedConfig, where: str) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield a config and those inside it, each with its location for messages."""
    yield where, config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _walk_configs(part, f"{where}: {name}")
