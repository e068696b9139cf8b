"""The model classes that a model type stands for."""

from __future__ import annotations

__all__ = ["default_architectures"]


def default_architectures(model_type: str) -> list[str]:
    """Return the model classes that a config of this type most likely means: the causal language model, or the base."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) or MODEL_MAPPING_NAMES.get(model_type)
    return [name for name in (found if isinstance(found, tuple) else (found,)) if name]
