"""Where another stack's ranks hold a model's tensors: by the model's plan, and by the entries of a user's plan file."""

from __future__ import annotations

import reprlib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import HeaderError, PlanError, UnmatchedKeyError, UsageError
from plans.placement import Packed, Replicate, Shard, placement_from_json
from plans.plan import find_key, find_unmatched_keys
from plans.resolved_plan import ResolvedParameter, ResolvedPlan
from plans.text import format_names, shorten
from runtime.checkpoint.external.source import ExternalPlacement, ExternalSettings, UnevenPacked
from runtime.checkpoint.files.reading import is_size, parse_strict_json, read_at_most
from runtime.models.model import model_tensors
from runtime.planning.plan import Plan, runtime_dialect
from runtime.planning.resolve import Scale, check_scale_blocks, find_scales, place_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["find_declared_keys", "read_plan_file", "resolve_external_plan"]


def resolve_external_plan(model: PreTrainedModel, external: ExternalSettings) -> ResolvedPlan:
    """Return the placement of each tensor of a model, under each of its names.

    Args:
        model: the model, on meta.
        external: the settings. Their entries override those of the model's plan, a parameter's those of its module.

    Raises:
        PlanError: there is no plan, an entry matches nothing or gives a tensor an impossible placement, or two names
            of one tensor get different placements.
        IndivisibleError: a quantized weight would be split within a block that shares one scale.
    """
    scales = find_scales(model)
    keys = find_declared_keys(model, external)
    styles = {name: style for name, key in keys.items() if isinstance(style := external.plan[key], str)}
    base = _read_model_plan(model, external)
    entries = {**base.entries, **styles}
    rows = {row.name: row for row in place_tensors(model, Plan(base.mode, entries))}
    for name, key in keys.items():
        declared = external.plan[key]
        if not isinstance(declared, str):
            rows[name] = _apply_placement(rows[name], declared, key, scales.get(name))
    _check_tied(rows)
    parameters = tuple(rows.values())
    check_scale_blocks(external.mesh, parameters, scales)
    name, dialect = str(model.config.model_type), runtime_dialect().name
    return ResolvedPlan(name, base.mode, dialect, external.mesh, entries, parameters)


def _read_model_plan(model: PreTrainedModel, external: ExternalSettings) -> Plan:
    """Return the model's plan; a model needs none if the user gives one or there is a single rank."""
    needs_none = not model.tp_plan and (external.plan or external.mesh.world_size == 1)
    return Plan(external.effective_mode, {}) if needs_none else Plan.from_model(model, external.effective_mode)


def find_declared_keys(model: PreTrainedModel, external: ExternalSettings) -> dict[str, str]:
    """Return the user's key for each tensor that one matches. Scales follow their weights.

    Args:
        model: the model, on meta.
        external: the settings with the user's entries.

    Raises:
        UnmatchedKeyError: an entry matches nothing.
    """
    scales = find_scales(model)
    names = list(model_tensors(model))
    owners = {name.rpartition(".")[0] for name in names}
    if unmatched := find_unmatched_keys(external.plan, [*names, *owners]):
        raise UnmatchedKeyError(
            f"`plan`: {format_names(unmatched)} match no parameter of {type(model).__name__}, "
            "nor a module that has one",
            hint="correct or remove the entries",
            keys=unmatched,
        )
    weights = {name: scales[name].weight if name in scales else name for name in names}
    keys = {name: find_key(external.plan, weights[name], is_parameter=True) for name in names}
    return {name: key for name, key in keys.items() if key is not None}


def _apply_placement(
    row: ResolvedParameter, declared: ExternalPlacement, key: str, scale: Scale | None
) -> ResolvedParameter:
    if not isinstance(declared, Replicate) and declared.dim >= len(row.shape):
        raise PlanError(
            f"`plan`: {key!r} places {row.name} as {declared}, but it is {list(row.shape)}",
            hint="give each parameter of the module an entry of its own",
            key=key,
        )
    if isinstance(declared, UnevenPacked) and scale:
        raise PlanError(
            f"`plan`: {key!r} splits {row.name} into groups of different sizes, "
            "which is not supported for quantized weights",
            hint="save the whole model in hub form instead",
            key=key,
        )
    placement = declared.packed if isinstance(declared, UnevenPacked) else declared
    own = scale.placement(placement, len(row.shape)) if scale else placement
    return replace(row, placements=(Replicate(), own))


def _check_tied(rows: Mapping[str, ResolvedParameter]) -> None:
    for row in rows.values():
        if row.tied_to is not None and row.placements != rows[row.tied_to].placements:
            raise PlanError(
                f"{row.name} and {row.tied_to} are one tensor, but are placed as {row.placements[-1]} and as "
                f"{rows[row.tied_to].placements[-1]}",
                hint="give both the same placement in `plan`",
                names=[row.name, row.tied_to],
            )


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
