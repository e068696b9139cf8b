"""Checks that styles stand on the kinds of modules that they were made for, and that sharded parameters have a hook.

What a style does around a forward fits one kind of module: a sum of experts' outputs put on a norm computes something
else, and shapes fit. The kind is read from the module itself, never from its name in the model.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from plans.errors import PlanError
from plans.placement import Placement, Replicate, Shard
from plans.plan import choose_key, find_key, to_wildcard
from runtime.checks.head_parameters import fits_sharded_heads
from runtime.checks.plan_view import PlanView
from runtime.checks.sequence import is_norm
from runtime.styles.routing import DISPATCH_STYLE, ROUTER_STYLE
from runtime.styles.style import get_owner_kind

__all__ = ["ModuleKind", "check_module_kinds", "check_sharded_modules", "get_module_kind"]

ModuleKind = Literal["experts", "router", "Linear layer", "embedding", "norm", "module"]
"""Stacked experts; what chooses among such experts beside it; or what torch or its name says; `module` for all else."""

_SUM_STYLE = "moe_experts_allreduce"
_MADE_FOR: dict[str, frozenset[ModuleKind]] = {
    **dict.fromkeys(
        ("moe_tp_gate_up_colwise", "moe_tp_down_rowwise", "grouped_gemm", _SUM_STYLE, "moe_tp_experts", DISPATCH_STYLE),
        frozenset({"experts"}),
    ),
    ROUTER_STYLE: frozenset({"router"}),
    **dict.fromkeys(("activation", "sequence_parallel", "activation_seq_dim_2"), frozenset({"norm"})),
    **dict.fromkeys(
        ("embedding_rowwise", "embedding_colwise", "vocab_allreduce", "vocab_reduce_scatter"), frozenset({"embedding"})
    ),
}
"""The kinds that styles were made for; styles of Linear layers check their modules themselves."""


_PLURALS: dict[ModuleKind, str] = {
    "experts": "experts",
    "router": "routers",
    "Linear layer": "Linear layers",
    "embedding": "embeddings",
    "norm": "norms",
    "module": "other modules",
}


def get_module_kind(view: PlanView, name: str) -> ModuleKind:
    """Return the kind of a module of a model by what it is and holds."""
    module = view.modules[name]
    owner = get_owner_kind(module)
    if owner != "module":
        return "embedding" if owner == "embedding" else "Linear layer"
    if _count_stacked(module) is not None:
        return "experts"
    if is_norm(module):
        return "norm"
    return "router" if _is_router(view, name) else "module"


def _count_stacked(module: nn.Module) -> int | None:
    """Return how many experts a module stacks in its own parameters, None if it stacks none, as convolutions do not."""
    if type(module).__module__.startswith("torch.nn."):
        return None
    return next((value.shape[0] for value in module.parameters(recurse=False) if value.ndim > 2), None)


def _is_router(view: PlanView, name: str) -> bool:
    """Return whether a module has a row for each of the experts that stand beside it."""
    siblings = view.modules[name.rpartition(".")[0]].children() if name else ()
    counts = {_count_stacked(sibling) for sibling in siblings} - {None}
    rows = {value.shape[0] for value in view.modules[name].parameters() if value.ndim == 2}
    return bool(counts & rows)


def check_module_kinds(view: PlanView) -> None:
    """Check that no entry puts a style on a kind of module, or on its parameters, that the style was not made for.

    Parts without a config are not checked: experts may be any module there.

    Raises:
        PlanError: one does; names the module, its kind and the kinds that the style was made for.
    """
    if not view.is_whole_model:
        return
    own_styles = view.styles.registered
    for name, key in view.module_keys.items():
        if view.plan[key] not in own_styles:
            _check_kind(view, name, key, name)
    for parameter in view.parameter_names:
        own_key = find_key(view.plan, parameter, is_parameter=True)
        if own_key in (parameter, to_wildcard(parameter)) and view.plan[own_key] not in own_styles:
            _check_kind(view, parameter.rpartition(".")[0], own_key, parameter)


def _check_kind(view: PlanView, name: str, key: str, label: str) -> None:
    style = view.plan[key]
    made_for = _MADE_FOR.get(style)
    if made_for is None:
        return
    kind = get_module_kind(view, name)
    if kind not in made_for and not (kind == "module" and _is_without_parameters(view, name)):
        kinds = " and ".join(_PLURALS[each] for each in sorted(made_for))
        raise PlanError(
            f"{label}: {style!r} was made for {kinds}, but {name} is {_describe_kind(view, name, kind)}",
            hint=f"remove the entry {key!r}",
            module=name,
            style=style,
            kind=kind,
        )


def _is_without_parameters(view: PlanView, name: str) -> bool:
    """Return whether a module has no parameters, as a dropout beside a norm has none."""
    return next(view.modules[name].parameters(), None) is None


def _describe_kind(view: PlanView, name: str, kind: ModuleKind) -> str:
    class_name = type(view.modules[name]).__name__
    article = {"embedding": "an ", "experts": ""}.get(kind, "a ")
    return f"{article}{kind}, {class_name}"


def check_sharded_modules(view: PlanView) -> None:
    """Check that a style works around the forward of every module whose own parameters the plan shards.

    Without one the forward would use a shard as if it were the whole.

    Raises:
        PlanError: none does; the hint is the entry that would, if there is one that computes the same.
    """
    for parameter in view.parameter_names:
        owner = parameter.rpartition(".")[0]
        key = find_key(view.plan, parameter, is_parameter=True)
        style = view.find_module_style(owner)
        if key is None or (style is not None and style.around is not None):
            continue
        tensor = view.modules[owner].get_parameter(parameter.rpartition(".")[2])
        placement = view.find_placement(parameter, get_owner_kind(view.modules[owner]), tensor.ndim)
        if placement not in (None, Replicate()):
            raise PlanError(
                f"{parameter} is sharded, but no plan entry hooks {owner}, whose forward would use a shard as if it "
                "were the whole",
                hint=_suggest_hook(view, owner, parameter, key, placement),
                parameter=parameter,
            )


def _suggest_hook(view: PlanView, owner: str, parameter: str, key: str, placement: Placement | None) -> str:
    """Return the hint for a sharded parameter of a module without a hook: an entry that computes the same, or none."""
    kind, owner_key = get_module_kind(view, owner), choose_key(view.plan, owner)
    is_own_key = key in (parameter, to_wildcard(parameter))
    if kind == "experts" and is_own_key:
        masked = any(
            style is not None and style.name == ROUTER_STYLE
            for style in (view.find_module_style(name) for name in _list_siblings(view, owner))
        )
        style = DISPATCH_STYLE if placement == Shard(0) and not masked else _SUM_STYLE
        return f"add the entry {owner_key!r}: {style!r}"
    around = view.styles.style(view.plan[key], key).around
    if kind in ("Linear layer", "embedding") and is_own_key and around is not None and owner_key not in view.plan:
        return f"name the layer, {owner_key!r}: {view.plan[key]!r}, and remove the entry {key!r}"
    if kind == "module" and is_own_key and fits_sharded_heads(view, owner):
        return f"add the entry {owner_key!r}: 'local_params'"
    return f"remove the entry {key!r}"


def _list_siblings(view: PlanView, name: str) -> list[str]:
    parent = name.rpartition(".")[0]
    return [other for other in view.modules if other and other != name and other.rpartition(".")[0] == parent]
