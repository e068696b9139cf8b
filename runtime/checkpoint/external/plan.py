"""Where another stack's ranks hold a model's tensors: by the model's plan and the user's entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from plans.errors import PlanError, UnmatchedKeyError
from plans.placement import Replicate
from plans.plan import find_key, find_unmatched_keys
from plans.resolved_plan import ResolvedParameter, ResolvedPlan
from plans.text import format_names
from runtime.checkpoint.external.source import ExternalPlacement, ExternalSettings, UnevenPacked
from runtime.models.model import model_tensors
from runtime.planning.plan import Plan, runtime_dialect
from runtime.planning.resolve import Scale, check_scale_blocks, find_scales, place_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["find_declared_keys", "resolve_external_plan"]


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
