"""Sums made once, and parameters used right: what the entries of a model's modules ask of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.tensor import DTensor

from plans.errors import PlanError
from runtime.styles.placements import get_placement
from runtime.styles.style import HookSite, ParallelStyle, build_hook_error, get_owner_kind, has_sharded_parameters

__all__ = ["check_local_parameters", "check_single_sum"]

_REPLACEMENT_HINTS = {
    "linear": "give the layer and its weight one style, such as 'colwise' or 'rowwise', or cut nothing of it",
    "embedding": "give the embedding and its weight one style, such as 'embedding_rowwise', or cut nothing of it",
}


@dataclass(frozen=True)
class _HookedModule:
    """A hooked module and its style."""

    site: HookSite
    style: ParallelStyle


def check_single_sum(sites: Sequence[HookSite], styles: Mapping[str, ParallelStyle]) -> None:
    """Refuse an entry that sums what is whole below it already.

    Args:
        sites: every hooked module of a model.
        styles: by name.

    Raises:
        PlanError: it would count the lower one's output once for each rank.
    """
    hooked = _pair_with_styles(sites, styles)
    for summing in hooked:
        whole = _find_whole_output_below(summing, hooked) if summing.style.sums == "its parts" else None
        if whole is not None:
            site = summing.site
            does = "sums its own output" if whole.style.sums != "nothing" else "gives a whole output"
            raise build_hook_error(
                site,
                f"whose {whole.site.name} {does}: it would count {site.axis.size()} times",
                hint=f"remove the entry of {site.name}, or those of what is below it",
            )


def check_local_parameters(sites: Sequence[HookSite], styles: Mapping[str, ParallelStyle]) -> None:
    """Refuse sharded parameters of a module's own that its style does not know to compute with.

    Args:
        sites: every hooked module of a model, parameters sharded.
        styles: by name.

    Raises:
        PlanError: its output would be partial, or a piece be taken for the whole; names module and parameter.
    """
    hooked = _pair_with_styles(sites, styles)
    for one in hooked:
        for name, parameter in one.site.module._parameters.items():
            if isinstance(parameter, DTensor) and not _is_accepted(one, parameter, hooked):
                raise _build_local_parameter_error(one.site, name, parameter)


def _pair_with_styles(sites: Sequence[HookSite], styles: Mapping[str, ParallelStyle]) -> list[_HookedModule]:
    return [_HookedModule(site, styles[site.style]) for site in sites if styles[site.style].around is not None]


def _find_whole_output_below(parent: _HookedModule, hooked: Sequence[_HookedModule]) -> _HookedModule | None:
    for one in hooked:
        gives_whole = one.style.gives in ("whole", "sequence") and has_sharded_parameters(
            one.site.module, recurse=False
        )
        if _is_below(one.site, parent.site) and (gives_whole or one.style.sums != "nothing"):
            return one
    return None


def _is_accepted(module: _HookedModule, parameter: DTensor, hooked: Sequence[_HookedModule]) -> bool:
    owner, place = get_owner_kind(module.site.module), get_placement(parameter)
    fitting = [own for own in module.style.own if own.accepts(owner, place, parameter.ndim)]
    return any(not own.below_sum or _is_summed_above(module.site, hooked) for own in fitting)


def _is_summed_above(site: HookSite, hooked: Sequence[_HookedModule]) -> bool:
    """Say whether all of a module's parameters are cut and an entry above sums what comes of them."""
    cut = all(isinstance(parameter, DTensor) for parameter in site.module.parameters(recurse=False))
    return cut and any(above.style.sums == "its parts" and _is_below(site, above.site) for above in hooked)


def _is_below(site: HookSite, above: HookSite) -> bool:
    return site.name.startswith(f"{above.name}.")


def _build_local_parameter_error(site: HookSite, name: str, parameter: DTensor) -> PlanError:
    kind, place = type(site.module).__name__, get_placement(parameter)
    if parameter.ndim > 2:
        why = f"whose {name} is cut: its output would be partial and summed by nothing"
        return build_hook_error(
            site, why, "use moe_experts_allreduce for stacked experts, all_reduce for other modules"
        )
    why = f"whose own {name} is {place}: it would compute with a piece as if it were the whole {kind}"
    return build_hook_error(
        site, why, _REPLACEMENT_HINTS.get(get_owner_kind(site.module), f"remove the entry of {site.name}.{name}")
    )
