"""The plans of one config class proven, mode after mode, in the process that has the class's tree on its path."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from plans.errors import IndivisibleError, MigratorError, MismatchError, PlanError, UsageError
from plans.mesh import Mesh, Mode
from plans.plan import find_key, to_wildcard
from runtime.checks.plan import check_before_sharding
from runtime.checks.plan_view import PlanView
from runtime.models.declared_plans import read_declared_entries
from runtime.planning.plan import Plan, runtime_dialect
from runtime.planning.resolve import resolve
from runtime.processes.thread_ranks import check_rank_count
from runtime.proving.compare import Reference, build_inputs, compare_on_ranks, run_reference
from runtime.proving.sizes import Sizes
from runtime.proving.task import ModeResult, Outcome, ProofTask, build_mode_mesh
from runtime.proving.tiny_model import tiny_config, tiny_model
from runtime.styles.registry import STYLES
from runtime.validation.forced_routing import can_force_routing, count_experts
from runtime.validation.precision import FLOAT64

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from plans.resolved_plan import ResolvedPlan

__all__ = ["ClassProof", "describe_error"]

_PLANS: Mapping[Mode, tuple[str, ...]] = {
    "tp": ("tp",),
    "ep": ("ep",),
    "tp_ep": ("tp", "ep"),
    "sp": ("sp",),
    "sp_ep": ("sp", "ep"),
}
"""The plans that a mode combines, unless the class has one for the mode itself."""
_MAX_LENGTH = 300


def describe_error(error: BaseException) -> str:
    """Return an error in one line: its type and what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_MAX_LENGTH]


def _build_model(task: ProofTask, sizes: Sizes) -> PreTrainedModel:
    config: PreTrainedConfig
    if task.config is not None:
        config = getattr(import_module(task.module), task.class_name).from_dict(dict(task.config))
    else:
        config = tiny_config(task.module, task.class_name, task.variant, sizes, task.tp, task.ep)
    return tiny_model(config, FLOAT64.dtype, task.seed)


class ClassProof:
    """The proofs of one class; modes whose ranks take the same batches share a reference.

    Args:
        task: the class.
        sizes: the sizes of tiny models.
        timeout: seconds that the ranks of a mode may take.
    """

    def __init__(self, task: ProofTask, sizes: Sizes, timeout: float) -> None:
        self._task, self._sizes, self._timeout = task, sizes, timeout
        self._references: dict[tuple[int, int], Reference] = {}
        self._failure = ""
        try:
            self._model = _build_model(task, sizes)
        except Exception as error:  # what classes raise is not ours to list
            self._failure = describe_error(error)

    def prove(self, mode: Mode) -> ModeResult:
        """Return what becomes of the class in a mode."""
        if self._failure:
            return ModeResult(mode, "not instantiated", self._failure)
        start = time.perf_counter()
        result = replace(self._prove(mode), seconds=time.perf_counter() - start)
        gc.collect()  # models are cycles of modules and hooks, and their tensors are invisible to the collector
        return result

    def _prove(self, mode: Mode) -> ModeResult:
        missing = self._find_missing_plan(mode)
        if missing:
            return ModeResult(mode, "no plan", f"the class has no {missing} plan")
        try:
            task = self._task
            mesh = build_mode_mesh(mode, task.tp, task.ep, task.fsdp, task.replicate)
            check_rank_count(mesh.world_size)
            plan = Plan.from_model(self._model, mode)
            resolved = resolve(self._model, mesh, plan=plan)
            dialect = STYLES.dialect(runtime_dialect())
            check_before_sharding(PlanView(self._model, resolved.plan, dialect, STYLES), mesh)
        except MigratorError as error:
            return self._describe_refusal(mode, error)
        try:
            reference = self._compute_reference(mesh, mode)
        except Exception as error:  # what models raise is not ours to list
            return ModeResult(mode, "not instantiated", f"the unsharded model: {describe_error(error)}")
        try:
            return self._compare(mode, plan, resolved, reference)
        except MigratorError as error:
            return self._describe_refusal(mode, error)

    def _find_missing_plan(self, mode: Mode) -> str | None:
        """Return the kind of plan that a mode needs and the class does not have."""
        config = self._model.config
        if getattr(config, f"base_model_{mode}_plan", None):
            return None
        kinds = _PLANS[mode]
        return next((kind for kind in kinds if not getattr(config, f"base_model_{kind}_plan", None)), None)

    def _compute_reference(self, mesh: Mesh, mode: Mode) -> Reference:
        inputs = build_inputs(self._model, mesh, mode, self._task.seed, self._sizes)
        key = len(inputs), next(iter(inputs[0].values())).shape[-1]
        if key not in self._references:
            self._references[key] = run_reference(self._model, inputs)
        return self._references[key]

    def _compare(self, mode: Mode, plan: Plan, resolved: ResolvedPlan, reference: Reference) -> ModeResult:
        comparison = compare_on_ranks(reference, resolved, self._timeout)
        unexercised = reference.unexercised
        idle = count_experts(resolved, reference.idle_experts)
        if idle and can_force_routing(resolved):
            forced = run_reference(self._model, reference.inputs, idle)
            comparison = comparison.join(compare_on_ranks(forced, resolved, self._timeout))
            unexercised &= forced.unexercised
        worst = comparison.worst
        declared = {key for key, _ in read_declared_entries(self._model)}
        result = ModeResult(
            mode,
            "passed",
            logits=comparison.output,
            gradients=comparison.gradients[worst],
            worst=worst,
            sharded=comparison.sharded,
            added=tuple(sorted(plan.entries.keys() - declared)),
            unexercised=tuple(name for name in comparison.gradients if name in unexercised),
        )
        if not comparison.sharded:
            return replace(result, outcome="differs", why="the plan shards nothing")
        if comparison.largest <= FLOAT64.output_tolerance:
            return result
        off = f"logits off by {comparison.output:.1e}, gradient of {worst} by {comparison.gradients[worst]:.1e}"
        key = find_key(resolved.plan, worst, is_parameter=True) or ""
        return replace(result, outcome="differs", why=off, key=key)

    def _describe_refusal(self, mode: Mode, error: MigratorError) -> ModeResult:
        if isinstance(error.__cause__, MigratorError):
            error = error.__cause__  # without the rank's number, which says nothing where all ranks check the same
        return ModeResult(mode, _classify(error), error.message, error.hint, _find_key_at_fault(error))


def _classify(error: MigratorError) -> Outcome:
    match error:
        case IndivisibleError() | UsageError():
            return "does not fit"
        case PlanError():
            return "refused"
        case MismatchError():
            return "differs"
        case _:
            return "failed"


def _find_key_at_fault(error: MigratorError) -> str:
    """Return the plan key or the wildcard form of the module or parameter that an error names."""
    named = (error.data.get(name) for name in ("key", "parameter", "module", "name"))
    return next((to_wildcard(name) for name in named if isinstance(name, str)), "")
