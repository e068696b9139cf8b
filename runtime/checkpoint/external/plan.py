"""Where the ranks of a foreign stack hold a model's tensors: by the model's plan, or by what the user says instead."""

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
from runtime.planning.resolve import place_tensors
from runtime.planning.scales import Scale, check_scale_blocks, find_scales

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["find_declared_keys", "resolve_external_plan"]


def resolve_external_plan(model: PreTrainedModel, external: ExternalSettings) -> ResolvedPlan:
    """Return where each tensor of a model lies on the ranks, under each of its names.

    Args:
        model: on meta.
        external: whose own entries win over those of the model's plan, a parameter's over its module's.

    Raises:
        PlanError: the model has no plan and the user gave none, an entry names nothing or puts a tensor where it cannot
            be, or names of one tensor are put in different places.
        IndivisibleError: a quantized weight would be cut within a block that has one scale.
    """
    scales = find_scales(model)
    keys = find_declared_keys(model, external)
    styles = {name: style for name, key in keys.items() if isinstance(style := external.plan[key], str)}
    base = _read_model_plan(model, external)
    entries = {**base.entries, **styles}
    rows = {row.name: row for row in place_tensors(model, Plan(base.mode, entries))}
    for name, key in keys.items():
        said = external.plan[key]
        if not isinstance(said, str):
            rows[name] = _apply_placement(rows[name], said, key, scales.get(name))
    _check_tied(rows)
    parameters = tuple(rows.values())
    check_scale_blocks(external.mesh, parameters, scales)
    name, dialect = str(model.config.model_type), runtime_dialect().name
    return ResolvedPlan(name, base.mode, dialect, external.mesh, entries, parameters)


def _read_model_plan(model: PreTrainedModel, external: ExternalSettings) -> Plan:
    """Return the model's plan; a model without one may do where the user gives one, or nothing is cut."""
    needs_none = not model.tp_plan and (external.plan or external.mesh.world_size == 1)
    return Plan(external.effective_mode, {}) if needs_none else Plan.from_model(model, external.effective_mode)


def find_declared_keys(model: PreTrainedModel, external: ExternalSettings) -> dict[str, str]:
    """Return the user's key for each tensor that they speak of; scales go with their weights.

    Args:
        model: on meta.
        external: with the user's entries.

    Raises:
        UnmatchedKeyError: an entry names nothing.
    """
    scales = find_scales(model)
    names = list(model_tensors(model))
    owners = {name.rpartition(".")[0] for name in names}
    if unmatched := find_unmatched_keys(external.plan, [*names, *owners]):
        raise UnmatchedKeyError(
            f"`plan`: {format_names(unmatched)} match no parameter of {type(model).__name__}, nor a module that holds one",
            hint="correct or remove the entries",
            keys=unmatched,
        )
    decided = {name: scales[name].weight if name in scales else name for name in names}
    found = {name: find_key(external.plan, decided[name], is_parameter=True) for name in names}
    return {name: key for name, key in found.items() if key is not None}


def _apply_placement(
    row: ResolvedParameter, declared: ExternalPlacement, key: str, scale: Scale | None
) -> ResolvedParameter:
    if not isinstance(declared, Replicate) and declared.dim >= len(row.shape):
        raise PlanError(
            f"`plan`: {key!r} makes {row.name} {declared}, but it is {list(row.shape)}",
            hint="give each parameter of the module an entry of its own",
            key=key,
        )
    if isinstance(declared, UnevenPacked) and scale:
        raise PlanError(
            f"`plan`: {key!r} cuts {row.name} in groups of several sizes, which is not read of quantized weights",
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
                f"{row.name} and {row.tied_to} are one tensor, but are put at {row.placements[-1]} and at "
                f"{rows[row.tied_to].placements[-1]}",
                hint="give both an entry with one placement in `plan`",
                names=[row.name, row.tied_to],
            )
