"""Comparison of two configs: the entries by which they describe models that compute different things."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from plans.errors import CheckpointError
from plans.text import first_line

__all__ = ["ConfigDifference", "compare_entries"]

_INERT_ENTRIES = frozenset(
    {
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
        *("bos_token_id", "eos_token_id", "initializer_range", "use_cache"),
        *("id2label", "label2id", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        "router_aux_loss_coef",
    }
)
"""Entries of a config that affect no output, gradient or greedy token."""
_MAX_VALUE_LENGTH = 200
"""The number of characters of a value that messages show."""


@dataclass(frozen=True, slots=True)
class ConfigDifference:
    """An entry that differs between two configs.

    Args:
        key: the entry's name, dotted for an entry of a nested object.
        expected: the expected config's value, as text.
        found: the other config's value, as text.
    """

    key: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.key} {self.found} instead of {self.expected}"


def compare_entries(found: Mapping[str, object], expected: Mapping[str, object]) -> tuple[ConfigDifference, ...]:
    """Return the entries by which two configs describe models that compute different things.

    Entries that are written differently, or left out, may mean the same: transformers decides if it has the model type.

    Args:
        found: the entries of a config.json.
        expected: the entries of the config.json to compare with.
    """
    written = [_drop_inert_entries(entries) for entries in (found, expected)]
    if written[0] == written[1]:
        return ()
    try:
        read = [_drop_inert_entries(_normalize_entries(entries)) for entries in written]
    except CheckpointError:  # transformers does not have the model type or an entry.
        return tuple(_find_differences(*written))
    # Classes fill in the defaults of all entries that they have, so an entry of only one config has no effect.
    known = read[0].keys() & read[1].keys()
    return tuple(_find_differences(*({key: entries[key] for key in entries if key in known} for entries in read)))


def _drop_inert_entries(entries: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in entries.items() if key not in _INERT_ENTRIES}


def _normalize_entries(entries: Mapping[str, object]) -> dict[str, object]:
    """Return a config's entries as its class reads them: with defaults, and under current names.

    Raises:
        CheckpointError: transformers cannot read them.
    """
    from transformers import AutoConfig

    try:
        arguments: dict[str, Any] = json.loads(json.dumps(entries), object_hook=_decode_tagged_float)
        normalized: dict[str, object] = AutoConfig.for_model(arguments.pop("model_type", ""), **arguments).to_dict()
    except Exception as error:  # transformers' config classes may raise anything.
        raise CheckpointError(
            f"config.json: {first_line(error)}", hint="install a transformers release that has the model type"
        ) from error
    return normalized


def _decode_tagged_float(value: dict[str, Any]) -> object:
    """Return the number that an object stands for: transformers writes `{"__float__": "Infinity"}`, as JSON cannot."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _find_differences(found: Mapping[str, object], expected: Mapping[str, object]) -> Iterator[ConfigDifference]:
    found_values, expected_values = dict(_flatten(found)), dict(_flatten(expected))
    for key in dict.fromkeys([*found_values, *expected_values]):
        value, expected_value = found_values.get(key), expected_values.get(key)
        if value != expected_value:
            yield ConfigDifference(key, _format_value(expected_value), _format_value(value))


def _flatten(entries: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield a config's entries, those of nested objects under dotted names."""
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flatten(_drop_inert_entries(value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _format_value(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[:_MAX_VALUE_LENGTH]}…"
