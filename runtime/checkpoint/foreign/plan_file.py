"""The file behind `--plan`: where a stack cut parameters otherwise than the model's plan, in JSON or TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

from plans.errors import HeaderError, UsageError
from plans.placement import Placement, Replicate, placement_from_json
from runtime.checkpoint.files.reading import reading
from runtime.checkpoint.files.strict_json import strict_json

__all__ = ["read_plan_file"]

_MAX_BYTES = 10_000_000
_HINT = (
    'write key to style or placement: {"model.layers.*.mlp.down_proj": "rowwise", "model.norm": "replicate", '
    '"model.layers.*.self_attn.o_proj.weight": {"shard": 1}, '
    '"model.layers.*.mlp.experts.gate_up_proj": {"packed": [1, 2]}}'
)


def read_plan_file(path: Path) -> dict[str, str | Placement]:
    """Read key → style, or key → placement as manifests have it, `replicate` for `{"replicate": true}`.

    Args:
        path: ends in `.json` or `.toml`.

    Raises:
        UsageError: it is neither, or says something else.
        CheckpointError: it cannot be read.
    """
    parse = _PARSERS.get(path.suffix)
    if parse is None:
        raise UsageError(f"{path}: a plan is a .json or a .toml file", hint=_HINT, file=str(path))
    with reading(path):
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path}: over {_MAX_BYTES} bytes, no plan", hint=_HINT, file=str(path))
        text = path.read_bytes()
    try:
        table = parse(text, path)
    except HeaderError as error:
        raise UsageError(error.message, hint=_HINT, file=str(path)) from error
    return {key: _entry(path, key, value) for key, value in table.items()}


def _entry(path: Path, key: str, value: object) -> str | Placement:
    if value == "replicate":
        return Replicate()
    if isinstance(value, str):
        return value
    try:
        return placement_from_json(value)
    except HeaderError as error:
        quotes = "; in TOML a key with dots needs quotes" if path.suffix == ".toml" else ""
        raise UsageError(f"{path}: {key!r}: {error.message}", hint=_HINT + quotes, file=str(path), key=key) from error


def _toml(text: bytes, path: Path) -> Mapping[str, object]:
    try:
        return tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{path}: not valid TOML: {error}", hint=_HINT) from error


_PARSERS: Mapping[str, Callable[[bytes, Path], Mapping[str, object]]] = {".json": strict_json, ".toml": _toml}
