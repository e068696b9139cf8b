"""Models as their checkpoints store them: on meta, with the tensors that quantizers put in the place of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from plans.errors import CheckpointError, UsageError
from plans.text import first_line
from runtime.formats import find_method
from runtime.models.config import find_quantization
from runtime.models.model import build_meta_model, meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.core_model_loading import WeightTransform

__all__ = ["PackedExperts", "build_stored_model", "is_quantized"]


_BLOCK = 32
"""The number of values that share one scale."""


class PackedExperts(nn.Module):
    """The blocks and scales that are stored in the place of stacked experts.

    Args:
        experts: the module with `gate_up_proj` and `down_proj`, [experts, in, out], each with a bias, [experts, out].
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            count, inputs, outputs = experts.get_parameter(name).shape
            blocks = count, outputs, inputs // _BLOCK
            setattr(self, f"{name}_blocks", _make_meta_parameter(*blocks, _BLOCK // 2))
            setattr(self, f"{name}_scales", _make_meta_parameter(*blocks))
            setattr(self, f"{name}_bias", experts.get_parameter(f"{name}_bias"))

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """Stand for the forward of the experts, which plans may hook; packed blocks cannot be computed with."""
        raise NotImplementedError("packed experts do not run")


def _make_meta_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.uint8, device="meta"), requires_grad=False)


Settings = Mapping[str, Any]


def build_stored_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a config's model on meta with the tensors that its checkpoints store.

    The model serves for its names, shapes and plan; a quantized one cannot run.

    Raises:
        CheckpointError: the class refuses the config, or the quantizer its quantization_config.
        UsageError: the quantization method is not supported.
    """
    quantization = find_quantization(config)
    if quantization is None:
        return meta_model(config)
    where, settings = quantization
    method = str(settings.get("quant_method"))
    if method not in _QUANTIZERS:
        raise _unsupported_error(where, settings)
    return build_meta_model(config, lambda model: _QUANTIZERS[method](model, settings, where))


def _unsupported_error(where: str, settings: Settings) -> UsageError:
    """Return the error for a method that is not supported, with the next step that its format has."""
    method = str(settings.get("quant_method") or "")
    variant = next((str(settings[key]) for key in ("format", "quant_algo") if settings.get(key)), "")
    row = find_method(settings)
    details = ", ".join(filter(None, (row.name if row else "", variant)))
    described = (repr(method) if method else "that quant_method does not name") + (f" ({details})" if details else "")
    return UsageError(
        f"{where}: the quantization method {described} is not supported",
        hint=(row.step if row else "use the checkpoint that it was quantized from")
        + f"; {' and '.join(_QUANTIZERS)} are supported",
        method=method,
    )


def is_quantized(model: PreTrainedModel) -> bool:
    """Return whether `build_stored_model` put quantized tensors in the place of weights."""
    return bool(getattr(model, "is_quantized", False))


def _apply_fp8(model: PreTrainedModel, settings: Settings, where: str) -> None:
    """Let transformers' quantizer replace layers, as the checkpoint stores them on any hardware."""
    from transformers.quantizers import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config({**settings, "dequantize": False}, pre_quantized=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: quantization_config: {first_line(error)}", hint="correct the entry in config.json"
        ) from error
    quantizer.preprocess_model(model)
    model.hf_quantizer = quantizer
    model._weight_conversions = _find_save_conversions(model)


def _find_save_conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """Return the conversions that `save_pretrained` would revert, those of scales included.

    Renamings of scales that only some checkpoints need are left out, and so are changes of prefixes, which do not tell
    whether a checkpoint had them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange
    from transformers.quantizers.base import HfQuantizer

    known = get_model_conversion_mapping(model, add_legacy=False)
    kept = [entry for entry in known if not isinstance(entry, PrefixChange)]
    extended: list[WeightTransform] = HfQuantizer.update_weight_conversions(model.hf_quantizer, kept, model)
    return extended


def _apply_mxfp4(model: PreTrainedModel, settings: Settings, where: str) -> None:
    """Put the blocks and scales that checkpoints hold in the place of the experts' weights.

    transformers' own quantizer holds what its kernels make of them, and downloads the kernels to be built at all.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = settings.get("modules_to_not_convert")
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "GptOssExperts" and should_convert_module(name, kept):
            model.set_submodule(name, PackedExperts(module))
            model.is_quantized = True
    if not is_quantized(model):
        raise UsageError(f"{where}: mxfp4 is supported for gpt-oss experts only", hint="use the unquantized form")


_QUANTIZERS: Mapping[str, Callable[[PreTrainedModel, Settings, str], None]] = {
    "fp8": _apply_fp8,
    "mxfp4": _apply_mxfp4,
}
"""What applies a quantization to a model, by the config's `quant_method`."""
