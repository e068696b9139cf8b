"""Models without weights: a checkpoint's config read, its class found, its parameters built on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from plans.errors import CheckpointError, DependencyError, IncompleteError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "dtype_name",
    "find_config",
    "meta_model",
    "model_class",
    "read_config",
    "transformers_version",
]

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
}


DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a torch dtype."""
    return DTYPE_NAMES[dtype]


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
    """Read a checkpoint's config.json with the installed transformers, running no code of the checkpoint's own.

    Raises:
        IncompleteError: there is no config.json.
        CheckpointError: the file is not a config of a model type that the installed transformers knows.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise IncompleteError(
            f"{folder}: no config.json", hint="name a folder that save_pretrained wrote", folder=str(folder)
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{folder}/config.json: {_first_line(error)}",
            hint=f"transformers {transformers_version()} must know the model type; models with code of their own "
            "in the checkpoint are not run",
            folder=str(folder),
        ) from error
    # A config may name a kernel repository for its attention or experts, whose code would be fetched and run.
    # Grouped expert kernels also ask for widths in multiples of 16 bytes, which a rank's slice need not have.
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def find_config(source: str) -> PreTrainedConfig:
    """Return the config of a checkpoint folder, a config.json or a model type, whichever `source` names.

    Raises:
        UsageError: it names none of them.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    path = Path(source)
    if path.is_dir() or path.name == "config.json":
        return read_config(path if path.is_dir() else path.parent)
    if source not in CONFIG_MAPPING:
        raise UsageError(
            f"{source}: not a folder, a config.json or a model type of transformers {transformers_version()}",
            hint="name a folder that save_pretrained wrote",
            source=source,
        )
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(source) or MODEL_MAPPING_NAMES.get(source)
    names = found if isinstance(found, tuple) else (found,)
    return CONFIG_MAPPING[source](architectures=[name for name in names if name])


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the transformers class that a config's `architectures` names.

    Raises:
        CheckpointError: it names none, or one that the installed transformers does not have.
    """
    import transformers

    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"config.json names the architectures {names!r}, not a class of transformers {transformers_version()}",
            hint="set `architectures` to the model class that wrote the checkpoint",
            architectures=names,
        )
    return found


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the config's model with parameters on the meta device, buffers real and names tied.

    Raises:
        CheckpointError: the class refuses the config.
        UsageError: the config is quantized, which is not built yet.
    """
    from accelerate import init_empty_weights

    if getattr(config, "quantization_config", None):
        raise UsageError(
            f"{config.model_type}: quantized checkpoints are not supported yet",
            hint="use the checkpoint without `quantization_config`",
        )
    try:
        with init_empty_weights(include_buffers=False), _default_dtype(config.dtype):
            model: Any = model_class(config)(config)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(
            f"{config.model_type}: the model cannot be built from its config: {_first_line(error)}",
            hint="load it once with transformers itself to see the whole error",
        ) from error
    model.tie_weights()
    return model.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
