"""The choice of a plan: which of a model's plans, or which combination of them, applies in a mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, cast

from torch import nn

from plans.decompose import apply_edits, decompose
from plans.dialect import PARAM_LEVEL, Dialect, dialect_for_release, load_dialect
from plans.errors import MissingPlanError, UsageError
from plans.mesh import MODES, Mode
from plans.placement import Shard
from plans.plan import find_expert_keys, find_key, merge_expert_plan, to_wildcard
from runtime.checks.head_parameters import add_head_norm_entries
from runtime.checks.plan import check_model
from runtime.checks.plan_view import PlanView
from runtime.models.config import transformers_version
from runtime.models.declared_plans import read_declared_plan, read_tp_plan
from runtime.models.expert_layout import read_expert_layout
from runtime.models.model import default_architectures, find_tied_names, meta_model
from runtime.planning.sequence_plan import derive_sequence_plan
from runtime.styles.style import get_owner_kind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Plan", "convert_to_param_level", "get_released_plan", "runtime_dialect"]


@dataclass(frozen=True)
class Plan:
    """The entries that a mode applies to a model.

    Args:
        mode: `tp`, `ep`, `tp_ep`, `sp` or `sp_ep`.
        entries: key to style, with keys prefixed like the model's names.
    """

    mode: Mode
    entries: Mapping[str, str]

    @cached_property
    def expert_keys(self) -> frozenset[str]:
        """The keys of entries that shard over the expert axis; all others shard over `tp`."""
        return find_expert_keys(self.entries, self.mode, runtime_dialect())

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel | PreTrainedConfig,
        mode: Mode = "tp",
        plan: Mapping[str, str] | None = None,
    ) -> Plan:
        """Choose the plan of a mode.

        - An explicit plan is used unchanged.
        - `tp` is the param-level form of the model's TP plan, with the entries that it lacks for norms on heads and for
          an embedding that is tied to a sharded head.
        - `ep` is the model's EP plan alone.
        - `sp` is the model's SP plan, or one derived from the TP plan, since released models have no SP plan.
        - `tp_ep` and `sp_ep` combine these with the EP plan, without the entries that would shard within experts,
          unless the model has a combined plan of its own, such as `base_model_tp_ep_plan`.

        Args:
            model: a model, on meta or not, or a config, whose model is then built on meta.
            mode: the mode.
            plan: key to style, to use instead of the model's plans.

        Raises:
            UsageError: there is no such mode, or `model` is neither a model nor a config.
            MissingPlanError: the model has no plan for the mode, and none can be derived.
        """
        if mode not in MODES:
            raise UsageError(f"there is no mode {mode!r}", hint="choose one of " + ", ".join(MODES), mode=mode)
        if plan is not None:
            return cls(mode, dict(plan))
        return cls(mode, _PLAN_BUILDERS[mode](_as_model(model)))


def runtime_dialect() -> Dialect:
    """Return the dialect of plans that can run: the installed release's styles, the param-level and the branch's."""
    released = dialect_for_release(transformers_version()).with_overrides(load_dialect(PARAM_LEVEL))
    return released.with_defaults(load_dialect("dtensor"))


def get_released_plan(model: PreTrainedModel) -> dict[str, str]:
    """Return the TP plan that the installed transformers would apply, with keys prefixed like the model's names.

    Raises:
        PlanError: the model has none.
    """
    return _require_plan(model, read_tp_plan(model), "tp", "tensor parallel")


def convert_to_param_level(model: PreTrainedModel, plan: Mapping[str, str]) -> dict[str, str]:
    """Return a plan's param-level form; entries of experts whose layout that form does not fit stay unchanged."""
    layouts = {to_wildcard(name): read_expert_layout(name, module) for name, module in model.named_modules()}
    return apply_edits(plan, decompose(plan, layouts.get).edits)


def _build_tp_plan(model: PreTrainedModel) -> dict[str, str]:
    view = PlanView(model, convert_to_param_level(model, get_released_plan(model)), runtime_dialect())
    return add_head_norm_entries(replace(view, plan=_add_tied_embedding_entries(view)))


def _add_tied_embedding_entries(view: PlanView) -> dict[str, str]:
    """Return the plan with an entry for each embedding without one that shares its tensor with a sharded head."""
    entries: dict[str, str] = {}
    for pair in find_tied_names(view.model).items():
        owners = {name: name.rpartition(".")[0] for name in pair}
        placements = [view.find_placement(name, get_owner_kind(view.modules[owners[name]]), 2) for name in pair]
        for name in pair if Shard(0) in placements else ():
            has_entry = find_key(view.plan, name, is_parameter=True) is not None
            if not has_entry and isinstance(view.modules[owners[name]], nn.Embedding):
                entries[to_wildcard(owners[name])] = "embedding_rowwise"
    return {**view.plan, **entries}


def _build_ep_plan(model: PreTrainedModel) -> dict[str, str]:
    return _require_plan(model, read_declared_plan(model, "ep"), "ep", "expert parallel")


def _build_sp_plan(model: PreTrainedModel) -> dict[str, str]:
    return read_declared_plan(model, "sp") or derive_sequence_plan(model, _build_tp_plan(model), runtime_dialect())


def _build_tp_ep_plan(model: PreTrainedModel) -> dict[str, str]:
    return read_declared_plan(model, "tp_ep") or merge_expert_plan(
        _build_tp_plan(model), _build_ep_plan(model), runtime_dialect()
    )


def _build_sp_ep_plan(model: PreTrainedModel) -> dict[str, str]:
    return read_declared_plan(model, "sp_ep") or merge_expert_plan(
        _build_sp_plan(model), _build_ep_plan(model), runtime_dialect()
    )


_PLAN_BUILDERS: Mapping[Mode, Callable[[PreTrainedModel], dict[str, str]]] = {
    "tp": _build_tp_plan,
    "ep": _build_ep_plan,
    "sp": _build_sp_plan,
    "tp_ep": _build_tp_ep_plan,
    "sp_ep": _build_sp_ep_plan,
}


def _require_plan(model: PreTrainedModel, plan: dict[str, str], kind: str, description: str) -> dict[str, str]:
    if not plan:
        raise MissingPlanError(
            f"{type(model).__name__} has no {description} plan",
            hint=f"add a base_model_{kind}_plan to its config.json; validate --plan and the library also take your own",
            model=type(model).__name__,
        )
    return plan


def _as_model(model_or_config: object) -> PreTrainedModel:
    from transformers import PreTrainedConfig

    if isinstance(model_or_config, PreTrainedConfig):
        return _build_model(model_or_config)
    check_model(model_or_config)
    return cast("PreTrainedModel", model_or_config)


def _build_model(config: PreTrainedConfig) -> PreTrainedModel:
    if not config.architectures:
        config = copy.deepcopy(config)
        config.architectures = default_architectures(config.model_type)
    return meta_model(config)
