"""Checks of stacked experts: how their parameters lie in memory, and which placements keep gate and up together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from plans.errors import PlanError
from plans.model_facts import ExpertLayout
from plans.placement import Packed, Placement, Replicate, Shard
from plans.plan import to_wildcard
from plans.resolved_plan import ResolvedParameter
from runtime.models.expert_layout import read_expert_layout

__all__ = ["check_packed_experts", "check_stacked_experts"]


def check_stacked_experts(parameters: Sequence[ResolvedParameter]) -> None:
    """Check that the plan shards all or none of a module's stacked parameters, whose widths would not fit otherwise.

    Raises:
        PlanError: it shards some of them; names one that is whole.
    """
    stacked: dict[str, list[ResolvedParameter]] = {}
    for parameter in parameters:
        if parameter.kind == "parameter" and len(parameter.shape) > 2:
            stacked.setdefault(parameter.name.rpartition(".")[0], []).append(parameter)
    for owner, members in stacked.items():
        whole = [member.name for member in members if member.placements[-1] == Replicate()]
        if 0 < len(whole) < len(members):
            raise PlanError(
                f"{whole[0]} is whole, but the plan shards other parameters of {owner}, which would not fit it",
                hint=f"add an entry for {to_wildcard(whole[0])!r}, or remove those of the others",
                parameter=whole[0],
            )


def check_packed_experts(model: nn.Module, parameters: Sequence[ResolvedParameter]) -> None:
    """Check that each rank's slice holds gates together with their ups, and the inputs of `down_proj` that fit these.

    Shapes often fit either way, so that nothing but the numbers would show the mistake.

    Raises:
        PlanError: gate and up lie one after the other and are sharded as one, or alternate and are sharded as two, or
            `down_proj` is sharded otherwise than they are.
    """
    for parameter in parameters:
        owner, _, name = parameter.name.rpartition(".")
        if name not in ("gate_up_proj", "down_proj"):
            continue
        layout = read_expert_layout(owner, model.get_submodule(owner))
        if layout is None or not layout.gated:
            continue
        fitting, reason = _get_gate_up_placement(layout) if name == "gate_up_proj" else _get_down_placement(layout)
        if parameter.placements[-1] not in (Replicate(), Shard(0), fitting):
            raise PlanError(
                f"{parameter.name}: {parameter.style!r} makes it {parameter.placements[-1]}, but {reason}",
                hint=f"choose a style that makes it {fitting}, or expert parallelism",
                parameter=parameter.name,
            )


def _get_gate_up_placement(layout: ExpertLayout) -> tuple[Placement, str]:
    dim = 2 if layout.transposed else 1
    order = "lie one after the other" if layout.concatenated else "alternate"
    reason = f"gate and up {order} there: no rank's slice would hold gates together with their ups"
    return (Packed(dim, 2) if layout.concatenated else Shard(dim)), reason


def _get_down_placement(layout: ExpertLayout) -> tuple[Placement, str]:
    dim = 1 if layout.transposed else 2
    return Shard(dim), "the gates and ups of one rank compute one contiguous slice of its inputs"
