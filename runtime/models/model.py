"""Models without weights: a config's class, built with parameters on the meta device, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from plans.errors import CheckpointError, MigratorError, UsageError
from plans.text import first_line
from runtime.models.config import find_quantization, transformers_version

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "assume_architectures",
    "build_meta_model",
    "default_architectures",
    "describe_assumed_class",
    "find_model_class",
    "find_tied_names",
    "init_on_meta",
    "meta_model",
    "model_tensors",
    "tensor_kind",
]

Model = TypeVar("Model", bound=nn.Module)

_EMPTY_FACTORIES: frozenset[object] = frozenset({torch.empty})
_FILL_FACTORIES: frozenset[object] = frozenset({torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})
_RANDOM_INITS = frozenset(
    {
        *("normal_", "trunc_normal_", "uniform_"),
        *("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"),
    }
)
"""Functions of torch.nn.init by name, because transformers replaces them while it builds a model."""
_LARGE = 2**24
"""The number of elements up to which filling a tensor costs no time worth saving."""


def find_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the transformers class that a config's `architectures` names, or if it has none, its model type's.

    Raises:
        CheckpointError: it names a class that the installed transformers does not have.
    """
    import transformers

    names: Any = config.architectures or assume_architectures(config.model_type)
    model_class = None
    if isinstance(names, list) and names and isinstance(names[0], str):
        model_class = getattr(transformers, names[0], None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"config.json names the architectures {names!r}, not a class of transformers {transformers_version()}",
            hint="set `architectures` to the model class that wrote the checkpoint",
            architectures=names,
        )
    return model_class


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a config's model with parameters on the meta device, real buffers and tied names.

    Raises:
        CheckpointError: the class refuses the config.
        UsageError: the config is quantized, and quantized models cannot run.
    """
    quantization = find_quantization(config)
    if quantization is not None:
        raise UsageError(
            f"{quantization[0]}: has a quantization_config; quantized models are not run",
            hint="use the checkpoint's unquantized form",
            model_type=config.model_type,
        )
    return build_meta_model(config)


def build_meta_model(
    config: PreTrainedConfig, prepare: Callable[[PreTrainedModel], None] | None = None
) -> PreTrainedModel:
    """Build a config's model on meta, whatever its quantization settings.

    Args:
        config: the config, whose `architectures` or model type name the class.
        prepare: changes the model before its weights are tied.

    Raises:
        CheckpointError: the class refuses the config.
    """
    model_class = find_model_class(config)

    def build() -> PreTrainedModel:
        model = model_class(config)
        if prepare is not None:
            prepare(model)
        return model

    try:
        model: Any = init_on_meta(build, config.dtype)
        model.tie_weights()
    except MigratorError:
        raise
    except Exception as error:  # transformers' model classes may raise anything.
        raise CheckpointError(
            f"{config.name_or_path or config.model_type}: config.json does not describe a model: "
            f"{type(error).__name__}: {first_line(error)}",
            hint="correct the sizes in config.json; loading the model with transformers shows the full traceback",
        ) from error
    return model.eval()


def init_on_meta(build: Callable[[], Model], dtype: torch.dtype | None) -> Model:
    """Build a model with parameters on meta and real buffers.

    A class may fill a parameter with zeros, which takes its full size before it is a parameter. So large tensors are
    filled on meta. If one of them was a buffer after all, or met real tensors, the model is built again without this.

    Args:
        build: a function that builds the model.
        dtype: the dtype of floating-point tensors whose class does not choose one; None for torch's default.
    """
    with _MetaFactoryMode(largest=_LARGE) as redirected:
        try:
            model = _init_parameters_on_meta(build, dtype)
        except Exception:  # transformers' model classes may raise anything.
            if not redirected.has_redirected_large:
                raise
        else:
            if not (redirected.has_redirected_large and any(buffer.is_meta for buffer in model.buffers())):
                return model
    with _MetaFactoryMode(largest=None):
        return _init_parameters_on_meta(build, dtype)


def _init_parameters_on_meta(build: Callable[[], Model], dtype: torch.dtype | None) -> Model:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _default_dtype(dtype):
        return build()


class _MetaFactoryMode(TorchFunctionMode):
    """Creates empty tensors on meta, and filled ones of more than `largest` elements; None for no filled ones.

    What is on meta is not initialized.
    """

    def __init__(self, largest: int | None) -> None:
        super().__init__()
        self.largest = largest
        self.has_redirected_large = False

    def __torch_function__(
        self,
        func: Callable[..., torch.Tensor],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        options = dict(kwargs or {})
        if getattr(func, "__name__", None) in _RANDOM_INITS:
            # On meta they change nothing, in most of the time that building a model takes.
            tensor = args[0] if args else options["tensor"]
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        if func in _EMPTY_FACTORIES:
            return func(*args, **{**options, "device": "meta"})
        if func in _FILL_FACTORIES and self.largest is not None:
            on_meta = func(*args, **{**options, "device": "meta"})
            if on_meta.numel() > self.largest:
                self.has_redirected_large = True
                return on_meta
        return func(*args, **options)


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that a model's checkpoints hold: parameters, under all of their names, then saved buffers."""
    persistent = set(model.state_dict(keep_vars=True))
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **{name: buffer for name, buffer in model.named_buffers() if name in persistent},
    }


def tensor_kind(tensor: torch.Tensor) -> Literal["parameter", "buffer"]:
    """Return whether a tensor of a model is a parameter or a buffer."""
    return "parameter" if isinstance(tensor, nn.Parameter) else "buffer"


def find_tied_names(model: nn.Module) -> dict[str, str]:
    """Return the tied names of a model, each with the name that holds the bytes, transformers' source of the tie."""
    declared = dict(getattr(model, "all_tied_weights_keys", None) or {})
    holders: dict[int, str] = {}
    tied: dict[str, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in sorted(parameters, key=lambda item: item[0] in declared):
        holder = holders.setdefault(id(tensor), name)
        if holder != name:
            tied[name] = holder
    return tied


def assume_architectures(model_type: str) -> list[str]:
    """Return the class of a checkpoint whose config names none, as a config has it that was saved without its model.

    It is the class that generates: of text, of text from images, or of a sequence from another; or the base model.
    """
    from transformers.models.auto import modeling_auto

    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    )
    names = next(filter(None, (mapping.get(model_type) for mapping in mappings)), None)
    return [name for name in (names if isinstance(names, tuple) else (names,)) if name]


def describe_assumed_class(model: PreTrainedModel) -> str:
    """Return a note on which class was assumed, for errors; empty if the config names one."""
    if model.config.architectures:
        return ""
    return f"config.json names no `architectures`, so {type(model).__name__} was assumed"


def default_architectures(model_type: str) -> list[str]:
    """Return the model classes to build for a model type: the causal language model, or the base model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) or MODEL_MAPPING_NAMES.get(model_type)
    return [name for name in (names if isinstance(names, tuple) else (names,)) if name]
