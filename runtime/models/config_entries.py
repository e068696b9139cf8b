"""Two configs side by side: the entries by which one says to compute something else than the other."""

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
"""Entries of a config that change no output, gradient or greedy token."""
_MAX_VALUE_LENGTH = 200
"""Characters of a value that are told."""


@dataclass(frozen=True, slots=True)
class ConfigDifference:
    """An entry of a config, a dotted name where it is in a table, and what two configs say there."""

    key: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.key} {self.found} instead of {self.expected}"


def compare_entries(found: Mapping[str, object], expected: Mapping[str, object]) -> tuple[ConfigDifference, ...]:
    """Return the entries by which a model would compute something else than another one's.

    What is written otherwise, or not at all, may mean the same: transformers is asked, where it knows the model type.

    Args:
        found: a config.json's entries.
        expected: another one's.
    """
    written = [_drop_inert_entries(entries) for entries in (found, expected)]
    if written[0] == written[1]:
        return ()
    try:
        read = [_drop_inert_entries(_normalize_entries(entries)) for entries in written]
    except CheckpointError:  # of a model type or an entry that is not known; what is written differs all the same
        return tuple(_find_differences(*written))
    # What only one of them has now its class does not know, and fills what it knows in with its defaults.
    known = read[0].keys() & read[1].keys()
    return tuple(_find_differences(*({key: table[key] for key in table if key in known} for table in read)))


def _drop_inert_entries(entries: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in entries.items() if key not in _INERT_ENTRIES}


def _normalize_entries(entries: Mapping[str, object]) -> dict[str, object]:
    """Return a config's entries as its class reads them, with defaults, and in today's words.

    Raises:
        CheckpointError: transformers cannot read them.
    """
    from transformers import AutoConfig

    try:
        given: dict[str, Any] = json.loads(json.dumps(entries), object_hook=_decode_tagged_float)
        table: dict[str, object] = AutoConfig.for_model(given.pop("model_type", ""), **given).to_dict()
    except Exception as error:  # What transformers' config classes raise is not ours to list.
        raise CheckpointError(
            f"config.json: {first_line(error)}", hint="use a transformers that knows the model type"
        ) from error
    return table


def _decode_tagged_float(table: dict[str, Any]) -> object:
    """Return the number that transformers writes as a table, for JSON has no such: `{"__float__": "Infinity"}`."""
    return float(table["__float__"]) if table.keys() == {"__float__"} else table


def _find_differences(found: Mapping[str, object], expected: Mapping[str, object]) -> Iterator[ConfigDifference]:
    has, wanted = dict(_flatten(found)), dict(_flatten(expected))
    for key in dict.fromkeys([*has, *wanted]):
        if has.get(key) != wanted.get(key):
            yield ConfigDifference(key, _format_value(wanted.get(key)), _format_value(has.get(key)))


def _flatten(table: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    """Yield what a config says, that of the tables in it too, by dotted names."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(_drop_inert_entries(value), f"{above}{key}.")
        else:
            yield f"{above}{key}", list(value) if isinstance(value, tuple) else value


def _format_value(value: object) -> str:
    words = repr(value)
    return words if len(words) <= _MAX_VALUE_LENGTH else f"{words[:_MAX_VALUE_LENGTH]}…"
