"""Models without weights: a checkpoint's config read, its class found, its parameters built on the meta device."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from plans.errors import CheckpointError, DependencyError, IncompleteError, MigratorError, UsageError
from runtime.models.on_meta import built_on_meta
from runtime.wording import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "build_on_meta",
    "dtype_name",
    "meta_model",
    "model_class",
    "model_tensors",
    "quantization_of",
    "read_config",
    "tied_names",
    "transformers_version",
    "unreadable",
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
        IncompleteError: there is no config.json, or it cannot be read.
        CheckpointError: the file is not a config of a model type that the installed transformers knows.
    """
    from transformers import AutoConfig

    _check_readable(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # What transformers' config classes raise is not ours to list.
        raise CheckpointError(
            f"{folder}/config.json: {first_line(error)}",
            hint=f"correct the entry; transformers {transformers_version()} must know the model type, and models with "
            "code of their own in the checkpoint are not run",
            folder=str(folder),
        ) from error
    _check_dtype(config, folder)
    # A config may name a kernel repository for its attention or experts, whose code would be fetched and run.
    # Grouped expert kernels also ask for widths in multiples of 16 bytes, which a rank's slice need not have.
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def _check_readable(folder: Path) -> None:
    path = folder / "config.json"
    try:
        # Opening a pipe would wait for whoever writes to it.
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("not a regular file")
        path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IncompleteError(
            f"{folder}: no config.json",
            hint="name a folder that save_pretrained wrote",
            folder=str(folder),
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> IncompleteError:
    """Return the error of a file or folder that is there but cannot be read."""
    return IncompleteError(
        f"{path}: cannot be read: {error.strerror or error}",
        hint="check the path and that you may read it and its folder",
        path=str(path),
    )


def _check_dtype(config: PreTrainedConfig, folder: Path) -> None:
    if not isinstance(config.dtype, torch.dtype | None):
        raise CheckpointError(
            f"{folder}/config.json: {config.dtype!r} is not a dtype of torch {torch.__version__}",
            hint="set `dtype` to the one the weights were saved in, such as bfloat16",
            dtype=str(config.dtype),
        )


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the transformers class that a config's `architectures` names.

    Raises:
        CheckpointError: it names none, or one that the installed transformers does not have.
    """
    import transformers

    names: Any = config.architectures
    found = None
    if isinstance(names, list) and names and isinstance(names[0], str):
        found = getattr(transformers, names[0], None)
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
        UsageError: the config is quantized, and quantized models are not run.
    """
    found = quantization_of(config)
    if found is not None:
        raise UsageError(
            f"{found[0]}: has a quantization_config; quantized models are not run",
            hint="use the checkpoint's unquantized form",
            model_type=config.model_type,
        )
    return build_on_meta(config)


def build_on_meta(
    config: PreTrainedConfig, prepare: Callable[[PreTrainedModel], None] | None = None
) -> PreTrainedModel:
    """Build the config's model on meta, whatever quantization it speaks of.

    Args:
        config: whose `architectures` name the class.
        prepare: changes the model before its weights are tied.

    Raises:
        CheckpointError: the class refuses the config.
    """
    kind = model_class(config)

    def build() -> PreTrainedModel:
        built = kind(config)
        if prepare is not None:
            prepare(built)
        return built

    try:
        model: Any = built_on_meta(build, config.dtype)
        model.tie_weights()
    except MigratorError:
        raise
    except Exception as error:  # What transformers' model classes raise is not ours to list.
        raise CheckpointError(
            f"{config.name_or_path or config.model_type}: config.json does not describe a model: "
            f"{type(error).__name__}: {first_line(error)}",
            hint="correct the sizes in config.json; loading it once with transformers itself shows the whole error",
        ) from error
    return model.eval()


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of a model by name: its parameters, under all of their names, then its buffers.

    Buffers that the model does not save are left out.
    """
    persistent = set(model.state_dict(keep_vars=True))
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **{name: buffer for name, buffer in model.named_buffers() if name in persistent},
    }


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return each tied name of a model with the name that holds the bytes, the one transformers calls the source."""
    declared = dict(getattr(model, "all_tied_weights_keys", None) or {})
    holders: dict[int, str] = {}
    tied: dict[str, str] = {}
    rows = sorted(model.named_parameters(remove_duplicate=False), key=lambda row: row[0] in declared)
    for name, tensor in rows:
        holder = holders.setdefault(id(tensor), name)
        if holder != name:
            tied[name] = holder
    return tied


def quantization_of(config: PreTrainedConfig) -> tuple[str, Mapping[str, Any]] | None:
    """Return where a config, or one inside it, speaks of quantization, and what it says; None where it does not."""
    for where, part in _parts(config, "config.json"):
        settings: Any = getattr(part, "quantization_config", None)
        if settings:
            return where, settings if isinstance(settings, Mapping) else {"quant_method": repr(settings)}
    return None


def _parts(config: PreTrainedConfig, where: str) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield a config and those inside it, each with where it stands."""
    yield where, config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part, f"{where}: {name}")
