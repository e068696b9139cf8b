"""Reading a plan file: the parameters that another stack sharded differently from the model's plan, in JSON or TOML."""

from __future__ import annotations

import reprlib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

from plans.errors import HeaderError, UsageError
from plans.placement import Packed, Replicate, Shard, placement_from_json
from plans.text import shorten
from runtime.checkpoint.external.source import ExternalPlacement, UnevenPacked
from runtime.checkpoint.files.reading import read_at_most
from runtime.checkpoint.files.strict_json import is_size, parse_strict_json

__all__ = ["read_plan_file"]

_MAX_BYTES = 1_000_000
_MAX_DOTS = 32
_MAX_GROUPS = 64
_HINT = (
    'write key to style or placement: {"model.layers.*.mlp.down_proj": "rowwise", "model.norm": "replicate", '
    '"model.layers.*.self_attn.o_proj.weight": {"shard": 1}, '
    '"model.layers.*.mlp.experts.gate_up_proj": {"packed": [1, 2]}}'
)


def read_plan_file(path: Path) -> dict[str, str | ExternalPlacement]:
    """Read a plan file: the style of each key, or its placement as in manifests.

    `replicate` stands for `{"replicate": true}`, and `{"packed": [dim, [size, …]]}` for groups of different sizes.

    Args:
        path: a file whose name ends in `.json` or `.toml`.

    Raises:
        UsageError: the file has another name, or is not a plan.
        CheckpointError: the file cannot be read, is not a regular file, or is too large for a plan.
    """
    parse = _PARSERS.get(path.suffix)
    if parse is None:
        raise UsageError(f"{path}: a plan is a .json or a .toml file", hint=_HINT, file=str(path))
    text = read_at_most(path, _MAX_BYTES)
    try:
        entries = parse(text, path)
    except HeaderError as error:
        raise UsageError(error.message, hint=_HINT, file=str(path)) from error
    return {key: _parse_entry(path, key, value) for key, value in entries.items()}


def _parse_entry(path: Path, key: str, value: object) -> str | ExternalPlacement:
    if isinstance(value, str) and value != "replicate":
        return value
    try:
        return _parse_placement(value)
    except (HeaderError, RecursionError, ValueError) as error:
        quotes = "; in TOML, a key with dots needs quotes" if path.suffix == ".toml" else ""
        raise UsageError(
            f"{path}: {shorten(repr(key))}: {_shorten_value(value)} is not a placement",
            hint=_HINT + quotes,
            file=str(path),
            key=key,
        ) from error


def _parse_placement(value: object) -> ExternalPlacement:
    """Parse a placement, with no number larger than a tensor's size can be.

    Raises:
        HeaderError, RecursionError, ValueError: the value is not a placement.
    """
    match value:
        case "replicate":
            return Replicate()
        case {"packed": [dim, [_, *_] as sizes], **rest} if not rest and len(sizes) <= _MAX_GROUPS:
            if all(map(is_size, [dim, *sizes])):
                return UnevenPacked(dim, tuple(sizes))
    placement = placement_from_json(value)
    match placement:
        case Shard(dim) if not is_size(dim):
            raise ValueError(dim)
        case Packed(dim, groups) if not (is_size(dim) and is_size(groups)):
            raise ValueError(groups)
    return placement


def _shorten_value(value: object) -> str:
    """Return a value as text that fits on a line, no matter how deep or long the value is."""
    try:
        return shorten(reprlib.repr(value))
    except ValueError:  # Python does not print integers of thousands of digits.
        return "a number of thousands of digits"


def _parse_toml(text: bytes, path: Path) -> Mapping[str, object]:
    # Python's parser takes quadratic time in the parts of a dotted key; keys of plans are quoted instead.
    if any(line.count(b".") > _MAX_DOTS for line in text.split(b"\n")):
        raise HeaderError(f"{path}: a line with more than {_MAX_DOTS} dots, which no plan has", hint=_HINT)
    try:
        return tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{path}: not valid TOML: {shorten(str(error))}", hint=_HINT) from error


_PARSERS: Mapping[str, Callable[[bytes, Path], Mapping[str, object]]] = {
    ".json": parse_strict_json,
    ".toml": _parse_toml,
}
