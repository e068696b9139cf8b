"""The resolved plan of a model built on meta: which entry decides for each parameter, and where that puts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from plans.decompose import apply_edits, decompose
from plans.dialect import PARAM_LEVEL, Dialect, dialect_for_release, load_dialect
from plans.errors import PlanError, UsageError
from plans.layout import ExpertLayout
from plans.mesh import Mesh, Mode
from plans.placement import Placement, Replicate
from plans.plan import lookup, wildcard
from plans.resolved import Kind, ResolvedParameter, ResolvedPlan
from plans.style import Owner
from runtime.model import dtype_name, model_tensors, transformers_version
from runtime.plan_checks import check_divisible, unmatched_entries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["param_level_plan", "released_plan", "resolve", "runtime_dialect"]


def runtime_dialect() -> Dialect:
    """Return what plans may say here: the installed transformers' dialect with the param-level one laid over it."""
    return dialect_for_release(transformers_version()).overlaid(load_dialect(PARAM_LEVEL))


def released_plan(model: PreTrainedModel) -> dict[str, str]:
    """Return the TP plan as the installed transformers would apply it, keys prefixed as the model's names are.

    Raises:
        PlanError: the model has none.
    """
    plan = dict(model.tp_plan or {})
    if not plan:
        raise PlanError(
            f"{type(model).__name__} has no tensor parallel plan",
            hint="its config needs a `base_model_tp_plan`",
            model=type(model).__name__,
        )
    return plan


def param_level_plan(model: PreTrainedModel, plan: Mapping[str, str]) -> dict[str, str]:
    """Return a plan's param-level form, where the model's own experts have the layout that it describes."""
    layouts = {wildcard(name): _layout(name, module) for name, module in model.named_modules()}
    return apply_edits(plan, decompose(plan, layouts.get).edits)


def resolve(
    model: PreTrainedModel, mesh: Mesh, mode: Mode = "tp", plan: Mapping[str, str] | None = None
) -> ResolvedPlan:
    """Resolve a plan on a model.

    Args:
        model: built on meta or not; nothing of its data is read.
        mesh: the sizes of the mesh axes.
        mode: `tp` only.
        plan: by default the param-level form of the model's own TP plan.

    Raises:
        UnknownStyleError: an entry names a style that neither the release nor the param-level dialect has.
        UnmatchedKeyError: an entry names nothing that the model's classes could create.
        IndivisibleError: a packed parameter or the attention heads do not divide by the mesh axis.
        PlanError: the model has no plan, or entries of tied parameters contradict each other.
    """
    if mode != "tp" or mesh != Mesh(tp=mesh.tp):
        raise UsageError(
            f"mode {mode!r} on tp={mesh.tp}, ep={mesh.ep}, fsdp={mesh.fsdp} is not built yet", hint="use --tp alone"
        )
    dialect = runtime_dialect()
    chosen = dict(plan) if plan is not None else param_level_plan(model, released_plan(model))
    for key, style in chosen.items():
        dialect.style(style, key)
    unmatched = unmatched_entries(model, chosen)
    parameters = tuple(_resolve_tensors(model, mesh, chosen, dialect))
    check_divisible(model, mesh, chosen, dialect, parameters)
    return ResolvedPlan(str(model.config.model_type), mode, dialect.name, mesh, chosen, parameters, unmatched)


def _resolve_tensors(
    model: nn.Module, mesh: Mesh, plan: Mapping[str, str], dialect: Dialect
) -> Iterator[ResolvedParameter]:
    modules = dict(model.named_modules())
    tied = _tied_names(model)
    tensors = model_tensors(model)
    seen: dict[str, ResolvedParameter] = {}
    for name in sorted(tensors, key=lambda name: name in tied):
        found = _resolve_tensor(name, tensors[name], modules[name.rpartition(".")[0]], mesh, plan, dialect)
        if name in tied:
            found = _as_tied(found, seen[tied[name]])
        seen[name] = found
    yield from (seen[name] for name in tensors)


def _resolve_tensor(
    name: str,
    tensor: torch.Tensor,
    module: nn.Module,
    mesh: Mesh,
    plan: Mapping[str, str],
    dialect: Dialect,
) -> ResolvedParameter:
    kind: Kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
    key = lookup(plan, name, is_parameter=True) if kind == "parameter" else None
    style = plan[key] if key is not None else None
    placement: Placement | None = None
    if key is not None and style is not None:
        placement = dialect.style(style, key).placement(_owner(module), tensor.ndim, name.rpartition(".")[2])
    return ResolvedParameter(
        name=name,
        kind=kind,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        mesh="dense",
        placements=_on_axes(mesh, placement),
        key=key,
        style=style,
        reason=_reason(kind, name, key, placement),
    )


def _on_axes(mesh: Mesh, placement: Placement | None) -> tuple[Placement, ...]:
    assert mesh.world_size == mesh.tp, "FSDP and expert axes are refused before this"
    return (Replicate(), placement or Replicate())


def _reason(kind: Kind, name: str, key: str | None, placement: Placement | None) -> str:
    if kind == "buffer":
        return "buffers stay whole"
    if key is None:
        return "no plan entry"
    whose = "its own entry" if wildcard(name) == key else "its module's entry"
    return whose if placement else f"{whose}, which shards nothing"


def _as_tied(found: ResolvedParameter, target: ResolvedParameter) -> ResolvedParameter:
    if found.placements != target.placements:
        raise PlanError(
            f"{found.name} and {target.name} are one tensor, but the plan puts it at {found.placements[-1]} "
            f"by {found.key!r} and at {target.placements[-1]} by {target.key!r}",
            hint="give both entries styles with one placement, or untie the weights",
            names=[found.name, target.name],
        )
    return ResolvedParameter(
        **{
            **{name: getattr(found, name) for name in found.__dataclass_fields__},
            "kind": "tied",
            "reason": f"the same tensor as {target.name}",
            "tied_to": target.name,
        }
    )


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Return each tied name with the name that holds the bytes, the one transformers calls the source."""
    declared = dict(getattr(model, "all_tied_weights_keys", None) or {})
    holders: dict[int, str] = {}
    tied: dict[str, str] = {}
    rows = sorted(model.named_parameters(remove_duplicate=False), key=lambda row: row[0] in declared)
    for name, tensor in rows:
        holder = holders.setdefault(id(tensor), name)
        if holder != name:
            tied[name] = holder
    return tied


def _owner(module: nn.Module) -> Owner:
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "linear" if isinstance(module, nn.Linear) else "module"


def _layout(name: str, module: nn.Module) -> ExpertLayout | None:
    """Read an experts module's layout from its parameters' shapes and the flags its class was decorated with."""
    down = getattr(module, "down_proj", None)
    packed = getattr(module, "gate_up_proj", None)
    if not (isinstance(down, torch.Tensor) and down.ndim == 3):
        return None
    where = f"{type(module).__name__} at {name}"
    if not isinstance(packed, torch.Tensor):
        return ExpertLayout(where, gated=False)
    regular = packed.ndim == 3 and packed.shape[1] == 2 * down.shape[2] and packed.shape[2] == down.shape[1]
    return ExpertLayout(
        where,
        gated=bool(getattr(module, "has_gate", True)),
        transposed=bool(getattr(module, "is_transposed", False)) or not regular,
        concatenated=bool(getattr(module, "is_concatenated", True)),
        biased=bool(getattr(module, "has_bias", False)),
    )
