"""Plans held against what they are applied to: a model's parameters, before its first forward, or a list of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from plans.errors import MismatchError
from plans.mesh import Mesh
from plans.placement import Replicate
from plans.plan import find_key, find_unmatched_keys
from plans.resolved import ResolvedPlan
from runtime.parallel.structure import find_sharding_mismatches
from runtime.planning.plan import Plan, runtime_dialect
from runtime.planning.resolve import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PlanUse", "verify_plan", "verify_sharding"]

_MAX_LISTED = 3


@dataclass(frozen=True)
class PlanUse:
    """What a plan and a list of parameter names say of each other.

    Args:
        unused: entries that shard weights, but none of these.
        whole: parameters that no entry shards.
    """

    unused: tuple[str, ...]
    whole: tuple[str, ...]


def verify_sharding(
    model: PreTrainedModel, plan: ResolvedPlan | Plan | Mapping[str, str], mesh: Mesh | None = None
) -> None:
    """Check a parallel model from both sides: what the plan shards is sharded just so, everything else is whole.

    Every parameter that the plan shards must be a DTensor with the planned placement and local shape, every other one a
    plain tensor; tied names must share one parameter. Every module that the plan hooks must still carry its hook, which
    it loses where a module or its forward is replaced. Ask before the first forward: under FSDP some parameters show
    other placements afterwards.

    Args:
        model: after `parallelize`, loaded or still on meta.
        plan: what it was made parallel with; `parallelize` returns it.
        mesh: where the plan is not resolved, the sizes of the mesh; by default all ranks on one axis.

    Raises:
        MismatchError: something is not as planned; `data["mismatches"]` lists everything.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    resolved = plan if isinstance(plan, ResolvedPlan) else _resolve_for_world(model, plan, mesh)
    found = find_sharding_mismatches(model, resolved, rank)
    if found:
        shown = "; ".join(f"{one.name}: expected {one.expected}, found {one.found}" for one in found[:_MAX_LISTED])
        raise MismatchError(
            f"rank {rank}: {len(found)} tensors are not as the plan says: {shown}",
            hint="a style that should shard does not, a module or its forward was replaced, or the plan is not the one "
            "the model was made parallel with",
            mismatches=[one.to_json() for one in found],
        )


def verify_plan(keys: Iterable[str], plan: Plan | Mapping[str, str]) -> PlanUse:
    """Compare a plan with parameter names, a checkpoint's say.

    Only entries that shard weights can be unused: those that communicate in forwards name modules, not parameters.

    Args:
        keys: parameter names, `model.layers.0.mlp.experts.down_proj`.
        plan: key to style.

    Raises:
        UnknownStyleError: an entry names a style that cannot run here.
    """
    entries = plan.entries if isinstance(plan, Plan) else plan
    dialect = runtime_dialect()
    names = list(keys)
    sharding = {
        key: name
        for key, name in entries.items()
        if any(not isinstance(rule.place, Replicate) for rule in dialect.style(name, key).rules)
    }
    owners = [name.rpartition(".")[0] for name in names]
    return PlanUse(
        tuple(find_unmatched_keys(sharding, [*names, *owners])),
        tuple(name for name in names if find_key(sharding, name, is_parameter=True) is None),
    )


def _resolve_for_world(model: PreTrainedModel, plan: Plan | Mapping[str, str], mesh: Mesh | None) -> ResolvedPlan:
    chosen = plan if isinstance(plan, Plan) else Plan.from_model(model, plan=plan)
    world = dist.get_world_size() if dist.is_initialized() else 1
    sizes = mesh or Mesh(tp=world, ep=world if chosen.mode.endswith("ep") else 1)
    return resolve(model, sizes, plan=chosen)
