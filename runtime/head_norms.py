"""Norms on heads: whole parameters that see one rank's heads only, whose gradients are partial unless they are summed.

Attention with projections sharded by head may normalize each head, with one weight for all. Every rank then has the
gradient of its own heads, and nothing fails: the ranks' weights merely drift apart. The rule by which such a norm is
known: it stands beside a projection whose output the plan leaves sharded, it is as wide as a head or a part of one, and
no such projection takes an input of its width, as those behind the norms of latent attention do.

An activation function with parameters of its own, between such projections, is in the same place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from plans.dialect import Dialect
from plans.errors import PlanError
from plans.plan import lookup, wildcard

__all__ = ["check_head_norms", "with_head_norms"]

_SUMMED = "replicated_with_grad_allreduce"
_SUMMING = frozenset({_SUMMED, "activation", "sequence_parallel"})
_HEAD_WIDTHS = ("head_dim", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def with_head_norms(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> dict[str, str]:
    """Return a plan with an entry for every norm on heads that it forgets.

    Args:
        model: on meta or not.
        plan: key to style.
        dialect: that it is written in.
    """
    return {**plan, **{wildcard(name): _SUMMED for name, _ in _forgotten(model, plan, dialect)}}


def check_head_norms(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> None:
    """Refuse a plan that forgets a norm on heads, or gives it a style that leaves its gradient partial.

    Raises:
        PlanError: it does; the hint is the entry that is missing.
    """
    for name, projection in _forgotten(model, plan, dialect):
        raise PlanError(
            f"{name} is whole but works on each rank's own slice, which {projection} leaves sharded: its gradient "
            "would be another one on every rank",
            hint=f"give it the entry {wildcard(name)!r}: {_SUMMED!r}",
            module=name,
        )


def _forgotten(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> Iterator[tuple[str, str]]:
    """Yield each norm on heads whose gradient no entry sums, with a projection that leaves them sharded."""
    for name, owner in model.named_modules():
        sharded = dict(_sharded_projections(name, owner, plan, dialect))
        widths = {getattr(owner, attribute, None) for attribute in _HEAD_WIDTHS} - {None}
        widths -= {projection.in_features for projection in sharded.values()}
        for child, module in owner.named_children() if sharded else ():
            full = f"{name}.{child}"
            key = lookup(plan, full, is_parameter=False)
            between = _norm_width(module) in widths or (child.startswith("act") and _has_parameters(module))
            if between and (key is None or plan[key] not in _SUMMING):
                yield full, next(iter(sharded))


def _sharded_projections(
    name: str, attention: nn.Module, plan: Mapping[str, str], dialect: Dialect
) -> Iterator[tuple[str, nn.Linear]]:
    for child, module in attention.named_children():
        full = f"{name}.{child}"
        key = lookup(plan, full, is_parameter=False)
        if key is not None and isinstance(module, nn.Linear) and dialect.style(plan[key], key).output == "sharded":
            yield full, module


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _norm_width(module: nn.Module) -> int | None:
    """Return the width of a norm's parameters, None where it has none or is none."""
    shapes = {tuple(parameter.shape) for parameter in module.parameters(recurse=False)}
    if "norm" not in type(module).__name__.lower() or len(shapes) != 1:
        return None
    shape = next(iter(shapes))
    return shape[0] if len(shape) == 1 else None
