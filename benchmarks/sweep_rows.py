"""One row of the sweep, run on every rank: a tiny model made parallel, held against the unsharded one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from benchmarks.sweep_cases import Case
from benchmarks.sweep_models import tiny_config, tiny_inputs, tiny_model
from plans.errors import MigratorError
from plans.mesh import Mesh, Mode
from runtime.parallel.mesh import device_meshes
from runtime.parallel.parallelize import parallelize
from runtime.parallel.verify import verify_sharding
from runtime.planning.plan import Plan
from runtime.planning.resolve import resolve
from runtime.styles.placements import cut_local_shard, get_placement
from runtime.validation.precision import FLOAT32, FLOAT64

__all__ = ["TOLERANCES", "Result", "one_line", "run_case"]

TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.float64: 1e-10}
_FLOOR = 1e-3
"""Of the largest gradient: a parameter with smaller ones is measured by this, lest their rounding count as wrong. What
is off by its own size still shows unless it is smaller than this floor times the tolerance."""


@dataclass(frozen=True)
class Result:
    """What became of one mode of a class.

    Args:
        outcome: `passed`, `refused`, `wrong`, `no plan` or `not instantiated`.
        why: what to know of it, in one line.
    """

    outcome: str
    why: str


@dataclass(frozen=True)
class Errors:
    """How far a parallel model is off, relative to the unsharded one.

    Args:
        output: the largest error of the logits.
        gradients: the largest error of each parameter's gradient.
        sharded: how many parameters are.
    """

    output: float
    gradients: Mapping[str, float]
    sharded: int

    @property
    def largest(self) -> float:
        """The largest error of all."""
        return max(self.output, *self.gradients.values())

    def __str__(self) -> str:
        return f"logits {self.output:.0e}, gradients {max(self.gradients.values()):.0e}, {self.sharded} sharded"


def run_case(case: Case, mode: Mode) -> Result:
    """Run a class in a mode on all ranks of the process group.

    In float32; where that is off by more than the tolerance, once more in float64, and in that throughout, whatever
    the model's code casts to. Rounding is then gone, and what is wrong is as wrong as before.
    """
    if mode not in case.plans:
        return Result("no plan", f"the class has no {mode} plan")
    try:
        return _judged(case, mode)
    except MigratorError as error:
        return Result("refused", error.message)


def _judged(case: Case, mode: Mode) -> Result:
    said = ""
    for dtype in TOLERANCES:
        try:
            reference = _built(case, dtype)
            expected = _output_and_gradients(reference, dtype)
            assert expected.isfinite().all(), "its logits are not finite"
        except Exception as error:  # What models raise is not ours to list.
            return Result("not instantiated", one_line(error))
        model = _built(case, dtype)
        plan = Plan.from_model(model, mode)
        _parallelize(model, plan)
        errors = _errors(model, reference, expected, dtype)
        # Ranks must agree on whether there is a second pass.
        worst = torch.tensor(errors.largest)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if not errors.sharded:
            return Result("wrong", "nothing was sharded")
        if worst < TOLERANCES[dtype]:
            return Result("passed", f"{errors}{said}{_added(plan, model)}")
        said = f" in float64; float32: {errors}"
    name = max(errors.gradients, key=lambda name: errors.gradients[name])
    return Result("wrong", f"{errors}: {name}{said}")


def _built(case: Case, dtype: torch.dtype) -> Any:
    """Build a class's model with the plans that its class has in the rewritten source."""
    config = tiny_config(case.family, case.class_name, case.variant)
    for kind, plan in case.plans.items():
        setattr(config, f"base_model_{kind}_plan", dict(plan))
    return tiny_model(config, dtype)


def _parallelize(model: Any, plan: Plan) -> None:
    mesh = Mesh(tp=dist.get_world_size(), ep=dist.get_world_size() if plan.mode == "ep" else 1)
    resolved = resolve(model, mesh, plan=plan)
    parallelize(model, device_meshes(mesh, "cpu"), resolved)
    verify_sharding(model, resolved)


def _added(plan: Plan, model: Any) -> str:
    """Say which entries of a plan the class does not write down itself."""
    added = sorted(plan.entries.keys() - (model.tp_plan if plan.mode == "tp" else plan.entries).keys())
    return f", adds {', '.join(f'`{key}`' for key in added)}" if added else ""


def _output_and_gradients(model: Any, dtype: torch.dtype) -> torch.Tensor:
    """Run a model and a loss that weighs every logit differently; return the logits."""
    inputs = tiny_inputs(model, dtype)
    with (FLOAT64 if dtype == torch.float64 else FLOAT32).computing():
        outputs = model(**inputs)
        found = [getattr(outputs, name, None) for name in ("logits", "last_hidden_state")]
        output: torch.Tensor = next(tensor for tensor in found if isinstance(tensor, torch.Tensor))
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        (output * weights).mean().backward()
    return output.detach()


def _errors(model: Any, reference: nn.Module, expected: torch.Tensor, dtype: torch.dtype) -> Errors:
    output = _relative(_output_and_gradients(model, dtype), expected, float(expected.abs().max()))
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters()}
    floor = _FLOOR * max(float(gradient.abs().max()) for gradient in wanted.values() if gradient is not None)
    gradients = {name: _gradient_error(found, wanted[name], floor) for name, found in model.named_parameters()}
    sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    return Errors(output, gradients, sharded)


def _gradient_error(parameter: nn.Parameter, whole: torch.Tensor | None, floor: float) -> float:
    if whole is None or parameter.grad is None:
        return 0.0 if whole is None and parameter.grad is None else float("inf")
    found = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
    expected = cut_local_shard(whole, get_placement(parameter), dist.get_world_size(), dist.get_rank())
    return _relative(found, expected, max(float(whole.abs().max()), floor))


def _relative(found: torch.Tensor, expected: torch.Tensor, scale: float) -> float:
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    error = (found - expected).abs().nan_to_num(nan=float("inf")).max()
    return float(error) / scale if scale else float("inf")


def one_line(error: Exception) -> str:
    """Return an error's type and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
