"""Sums made once, and parameters used right: what the entries of a model's modules ask of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.tensor import DTensor

from plans.errors import PlanError
from runtime.styles.placements import placement_of
from runtime.styles.style import ParallelStyle, Site, has_sharded, owner_of, refuse

__all__ = ["check_own_parameters", "check_summed_once"]

_INSTEAD = {
    "linear": "give the layer and its weight one style, such as 'colwise' or 'rowwise', or cut nothing of it",
    "embedding": "give the embedding and its weight one style, such as 'embedding_rowwise', or cut nothing of it",
}


@dataclass(frozen=True)
class _Hooked:
    """A hooked module and its style."""

    site: Site
    style: ParallelStyle


def check_summed_once(sites: Sequence[Site], styles: Mapping[str, ParallelStyle]) -> None:
    """Refuse an entry that sums what is whole below it already.

    Args:
        sites: every hooked module of a model.
        styles: by name.

    Raises:
        PlanError: it would count the lower one's output once for each rank.
    """
    hooked = _hooked(sites, styles)
    for summing in hooked:
        whole = _whole_below(summing, hooked) if summing.style.sums == "its parts" else None
        if whole is not None:
            site = summing.site
            does = "sums its own output" if whole.style.sums != "nothing" else "gives a whole output"
            raise refuse(
                site,
                f"whose {whole.site.name} {does}: it would count {site.axis.size()} times",
                hint=f"remove the entry of {site.name}, or those of what is below it",
            )


def check_own_parameters(sites: Sequence[Site], styles: Mapping[str, ParallelStyle]) -> None:
    """Refuse sharded parameters of a module's own that its style does not know to compute with.

    Args:
        sites: every hooked module of a model, parameters sharded.
        styles: by name.

    Raises:
        PlanError: its output would be partial, or a piece be taken for the whole; names module and parameter.
    """
    hooked = _hooked(sites, styles)
    for one in hooked:
        for name, parameter in one.site.module._parameters.items():
            if isinstance(parameter, DTensor) and not _accepted(one, parameter, hooked):
                raise _refused(one.site, name, parameter)


def _hooked(sites: Sequence[Site], styles: Mapping[str, ParallelStyle]) -> list[_Hooked]:
    return [_Hooked(site, styles[site.style]) for site in sites if styles[site.style].around is not None]


def _whole_below(summing: _Hooked, hooked: Sequence[_Hooked]) -> _Hooked | None:
    for one in hooked:
        gives_whole = one.style.gives in ("whole", "sequence") and has_sharded(one.site.module, recurse=False)
        if _is_below(one.site, summing.site) and (gives_whole or one.style.sums != "nothing"):
            return one
    return None


def _accepted(one: _Hooked, parameter: DTensor, hooked: Sequence[_Hooked]) -> bool:
    owner, place = owner_of(one.site.module), placement_of(parameter)
    fitting = [own for own in one.style.own if own.accepts(owner, place, parameter.ndim)]
    return any(not own.below_sum or _is_summed_above(one.site, hooked) for own in fitting)


def _is_summed_above(site: Site, hooked: Sequence[_Hooked]) -> bool:
    """Say whether all of a module's parameters are cut and an entry above sums what comes of them."""
    cut = all(isinstance(parameter, DTensor) for parameter in site.module.parameters(recurse=False))
    return cut and any(above.style.sums == "its parts" and _is_below(site, above.site) for above in hooked)


def _is_below(site: Site, above: Site) -> bool:
    return site.name.startswith(f"{above.name}.")


def _refused(site: Site, name: str, parameter: DTensor) -> PlanError:
    kind, place = type(site.module).__name__, placement_of(parameter)
    if parameter.ndim > 2:
        why = f"whose {name} is cut: its output would be partial and summed by nothing"
        return refuse(site, why, "use moe_experts_allreduce for stacked experts, all_reduce for other modules")
    why = f"whose own {name} is {place}: it would compute with a piece as if it were the whole {kind}"
    return refuse(site, why, _INSTEAD.get(owner_of(site.module), f"remove the entry of {site.name}.{name}"))
