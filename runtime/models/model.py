"""Models without weights: a config's class found, its parameters built on the meta device, and their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from plans.errors import CheckpointError, MigratorError, UsageError
from plans.text import first_line
from runtime.models.config import find_quantization, transformers_version
from runtime.models.on_meta import init_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "build_meta_model",
    "default_architectures",
    "find_model_class",
    "find_tied_names",
    "meta_model",
    "model_tensors",
    "tensor_kind",
]


def find_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
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
    found = find_quantization(config)
    if found is not None:
        raise UsageError(
            f"{found[0]}: has a quantization_config; quantized models are not run",
            hint="use the checkpoint's unquantized form",
            model_type=config.model_type,
        )
    return build_meta_model(config)


def build_meta_model(
    config: PreTrainedConfig, prepare: Callable[[PreTrainedModel], None] | None = None
) -> PreTrainedModel:
    """Build the config's model on meta, whatever quantization it speaks of.

    Args:
        config: whose `architectures` name the class.
        prepare: changes the model before its weights are tied.

    Raises:
        CheckpointError: the class refuses the config.
    """
    kind = find_model_class(config)

    def build() -> PreTrainedModel:
        built = kind(config)
        if prepare is not None:
            prepare(built)
        return built

    try:
        model: Any = init_on_meta(build, config.dtype)
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


def tensor_kind(tensor: torch.Tensor) -> Literal["parameter", "buffer"]:
    """Return which of the two one of a model's own tensors is."""
    return "parameter" if isinstance(tensor, nn.Parameter) else "buffer"


def find_tied_names(model: nn.Module) -> dict[str, str]:
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


def default_architectures(model_type: str) -> list[str]:
    """Return the model classes that a config of this type most likely means: the causal language model, or the base."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) or MODEL_MAPPING_NAMES.get(model_type)
    return [name for name in (found if isinstance(found, tuple) else (found,)) if name]
