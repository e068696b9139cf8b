"""Tied names that a checkpoint stores although they are other names of one tensor."""

from __future__ import annotations

from collections.abc import Mapping

from plans.errors import ConversionError
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.files.same_bytes import has_same_bytes
from runtime.checkpoint.hub.hf import HubCheckpoint
from runtime.checkpoint.hub.names import Conversion
from runtime.extents.forms import TensorMap, whole

__all__ = ["check_duplicates"]


def check_duplicates(hub: HubCheckpoint, conversion: Conversion, tied: Mapping[str, str]) -> None:
    """Refuse a tied name that is stored besides its target, unless it holds the same bytes.

    Args:
        hub: the checkpoint.
        conversion: of its tensors to the model's.
        tied: each tied name with the name that holds the bytes.

    Raises:
        ConversionError: the two differ.
    """
    for name, form in conversion.duplicates.items():
        own, other = _get_whole_tensor(form, hub), _get_whole_tensor(conversion.tensor_maps[tied[name]], hub)
        if own is not None and other is not None and has_same_bytes(own, other):
            continue
        raise ConversionError(
            f"{name} is tied to {tied[name]} but stored with other values",
            hint="set tie_word_embeddings to false in config.json, or remove one of the two",
            name=name,
            tied_to=tied[name],
        )


def _get_whole_tensor(tensor_map: TensorMap, hub: HubCheckpoint) -> StoredTensor | None:
    """Return the stored tensor that a form is, if it is one and all of it."""
    tensors = [hub.tensors[source] for source in tensor_map.sources]
    return tensors[0] if len(tensors) == 1 and tensor_map == whole(tensor_map.sources[0], tensors[0].shape) else None
