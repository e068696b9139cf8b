"""Plans chosen: which of a model's plans, or which combination of them, applies in a mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from plans.decompose import apply_edits, decompose
from plans.dialect import PARAM_LEVEL, Dialect, dialect_for_release, load_dialect
from plans.errors import PlanError, UsageError
from plans.expert_axis import expert_keys, merged
from plans.mesh import MODES, Mode
from plans.plan import wildcard
from runtime.blocks.head_norms import with_head_norms
from runtime.models.architectures import default_architectures
from runtime.models.config import transformers_version
from runtime.models.model import meta_model
from runtime.planning.experts_layout import read_layout
from runtime.planning.key_checks import check_model
from runtime.planning.sequence_plan import sequence_plan
from runtime.planning.tied_embeddings import with_tied_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Plan", "param_level_plan", "released_plan", "runtime_dialect"]


@dataclass(frozen=True)
class Plan:
    """What one mode applies to a model.

    Args:
        mode: `tp`, `ep`, `tp_ep`, `sp` or `sp_ep`.
        entries: key to style, keys prefixed as the model's names are.
    """

    mode: Mode
    entries: Mapping[str, str]

    @cached_property
    def expert_keys(self) -> frozenset[str]:
        """The keys whose entries work over the expert axis; all others work over `tp`."""
        return expert_keys(self.entries, self.mode, runtime_dialect())

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel | PreTrainedConfig,
        mode: Mode = "tp",
        plan: Mapping[str, str] | None = None,
    ) -> Plan:
        """Choose the plan of a mode.

        An explicit plan wins and is taken as it is. Otherwise `tp` is the param-level form of the model's TP plan, with
        entries that the plan forgets, those of norms on heads (`runtime.blocks.head_norms`) and of an embedding that is
        one with a sharded head (`runtime.planning.tied_embeddings`), `ep` its EP plan alone, `sp` its SP
        plan, and the combined modes lay the EP plan over those, dropping the entries that would cut whole experts. A
        combined plan that the model brings along, `base_model_tp_ep_plan`, wins over the combination. A model without
        an SP plan, as every released one, gets the one that `runtime.planning.sequence_plan.sequence_plan` derives.

        Args:
            model: a model, on meta or not, or a config, whose model is then built on meta.
            mode: which of them.
            plan: key to style, in place of what the model says.

        Raises:
            UsageError: there is no such mode, or it is neither a model nor a config.
            PlanError: the model has no plan for the mode, and none can be derived.
        """
        if mode not in MODES:
            raise UsageError(f"no mode is called {mode!r}", hint="choose among " + ", ".join(MODES), mode=mode)
        if plan is not None:
            return cls(mode, dict(plan))
        return cls(mode, _CHOICES[mode](_as_model(model)))


def runtime_dialect() -> Dialect:
    """Return what plans may say here: the installed transformers' dialect, param-level names, and the branch's own."""
    released = dialect_for_release(transformers_version()).overlaid(load_dialect(PARAM_LEVEL))
    return released.extended(load_dialect("dtensor"))


def released_plan(model: PreTrainedModel) -> dict[str, str]:
    """Return the TP plan as the installed transformers would apply it, keys prefixed as the model's names are.

    Raises:
        PlanError: the model has none.
    """
    return _needed(model, dict(model.tp_plan or {}), "tp", "tensor parallel")


def param_level_plan(model: PreTrainedModel, plan: Mapping[str, str]) -> dict[str, str]:
    """Return a plan's param-level form, where the model's own experts have the layout that it describes."""
    layouts = {wildcard(name): read_layout(name, module) for name, module in model.named_modules()}
    return apply_edits(plan, decompose(plan, layouts.get).edits)


def _tp(model: PreTrainedModel) -> dict[str, str]:
    dialect = runtime_dialect()
    plan = with_tied_embeddings(model, param_level_plan(model, released_plan(model)), dialect)
    return with_head_norms(model, plan, dialect)


def _ep(model: PreTrainedModel) -> dict[str, str]:
    return _needed(model, _written(model, "ep"), "ep", "expert parallel")


def _sp(model: PreTrainedModel) -> dict[str, str]:
    return _written(model, "sp") or sequence_plan(model, _tp(model), runtime_dialect())


def _tp_ep(model: PreTrainedModel) -> dict[str, str]:
    return _written(model, "tp_ep") or merged(_tp(model), _ep(model), runtime_dialect())


def _sp_ep(model: PreTrainedModel) -> dict[str, str]:
    return _written(model, "sp_ep") or merged(_sp(model), _ep(model), runtime_dialect())


_CHOICES: Mapping[Mode, Callable[[PreTrainedModel], dict[str, str]]] = {
    "tp": _tp,
    "ep": _ep,
    "sp": _sp,
    "tp_ep": _tp_ep,
    "sp_ep": _sp_ep,
}


def _written(model: PreTrainedModel, kind: str) -> dict[str, str]:
    """Return the plan of a kind that a model's classes and configs write down, keys prefixed as its names are."""
    found: dict[str, str] = {}
    for prefix, plan in _parts(model, kind, ""):
        found |= {f"{prefix}{key}": style for key, style in plan.items()}
    return found


def _parts(module: nn.Module, kind: str, prefix: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield what each model inside a model says, outermost first, as transformers gathers TP and EP plans."""
    own: Any = getattr(type(module), f"_{kind}_plan", None)
    if isinstance(own, Mapping):
        yield prefix, own
    if getattr(module, "base_model", None) is module:
        of_config: Any = getattr(getattr(module, "config", None), f"base_model_{kind}_plan", None)
        if isinstance(of_config, Mapping):
            yield prefix, of_config
    for name, child in module.named_children():
        if hasattr(child, "base_model"):
            yield from _parts(child, kind, f"{prefix}{name}.")


def _needed(model: PreTrainedModel, plan: dict[str, str], kind: str, words: str) -> dict[str, str]:
    if not plan:
        raise PlanError(
            f"{type(model).__name__} has no {words} plan",
            hint=f"its config needs a `base_model_{kind}_plan`, or pass a plan of your own",
            model=type(model).__name__,
        )
    return plan


def _as_model(given: object) -> PreTrainedModel:
    from transformers import PreTrainedConfig

    if isinstance(given, PreTrainedConfig):
        return _built(given)
    check_model(given)
    return cast("PreTrainedModel", given)


def _built(config: PreTrainedConfig) -> PreTrainedModel:
    if not config.architectures:
        config = copy.deepcopy(config)
        config.architectures = default_architectures(config.model_type)
    return meta_model(config)
