"""Sums made once: a module whose output an entry sums must hold nothing that sums the same output itself."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.styles.style import Site, refuse

__all__ = ["check_summed_once"]

_SUMS_OF_PARTS = frozenset({"all_reduce", "moe_experts_allreduce", "moe_tp_experts", "ep_dispatch_experts"})
_SUMS = _SUMS_OF_PARTS | {
    "rowwise", "rowwise_allreduce", "rowwise_reduce_scatter", "rowwise_rep", "rowwise_split_input"
}  # fmt: skip


def check_summed_once(sites: Sequence[Site]) -> None:
    """Refuse entries of which one sums what another has summed below it.

    Args:
        sites: every hooked module of a model.

    Raises:
        PlanError: it would count the lower one's output once for each rank.
    """
    summing = [site for site in sites if site.style in _SUMS]
    for site in sites:
        below = [one.name for one in summing if one.name.startswith(f"{site.name}.")]
        if site.style in _SUMS_OF_PARTS and below:
            raise refuse(
                site,
                f"whose {below[0]} sums its own output: it would count {site.axis.size()} times",
                hint=f"remove the entry of {site.name}, or those of what is below it",
            )
