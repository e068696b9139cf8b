"""Which plans an installed transformers release can run, once this runtime's styles are registered with it."""

from __future__ import annotations

from dataclasses import dataclass

from plans.dialect import dialect_for_release, suggest_style
from plans.errors import PlanError, UnknownStyleError, UsageError
from plans.plan import to_wildcard
from runtime.planning.plan import Plan

__all__ = ["PARALLELIZE_HINT", "Support"]

PARALLELIZE_HINT = "run the plan with runtime.parallelize, which needs no registry"


@dataclass(frozen=True)
class Support:
    """The styles of the installed release.

    Args:
        release: the version of transformers.
        styles: the names registered by this runtime, sorted.
        known: all names that the release knows now.
    """

    release: str
    styles: tuple[str, ...]
    known: frozenset[str]

    def require(self, plan: Plan) -> None:
        """Refuse a plan that the release would not apply, or only in part, mostly without an error.

        Args:
            plan: a plan chosen for a mode, for example `Plan.from_model(config, "ep")`.

        Raises:
            UsageError: the release does not have the plan's mode.
            UnknownStyleError: an entry names a style that the release does not know.
            PlanError: the release would match a key with nothing, ignore the expert plan because it lacks a style, or
                refuse a style in it.
        """
        dialect = dialect_for_release(self.release)
        self._check_mode(plan, combines=bool(dialect.expert_plan_needs))
        for key, style in plan.entries.items():
            self._check_entry(key, style, numbered_keys=dialect.numbered_keys)
        experts = {plan.entries[key] for key in plan.expert_keys}
        if experts:
            self._check_experts(experts, dialect.expert_plan_needs, dialect.expert_plan_refuses)

    def _check_mode(self, plan: Plan, *, combines: bool) -> None:
        if plan.mode in ("tp_ep", "sp_ep") and not combines:
            raise UsageError(
                f"transformers {self.release} cannot run mode {plan.mode!r}: its expert plan replaces the tensor plan",
                hint=f"install transformers 5.19 or newer, or {PARALLELIZE_HINT}",
                mode=plan.mode,
            )

    def _check_entry(self, key: str, style: str, *, numbered_keys: bool) -> None:
        if style not in self.known:
            raise UnknownStyleError(
                f"{key!r}: transformers {self.release} has no style {style!r}",
                hint=suggest_style(style, self.known, PARALLELIZE_HINT),
                key=key,
                style=style,
            )
        if not numbered_keys and key != to_wildcard(key):
            raise PlanError(
                f"{key!r} matches nothing in transformers {self.release}, which only looks up {to_wildcard(key)!r}",
                hint=PARALLELIZE_HINT,
                key=key,
            )

    def _check_experts(self, styles: set[str], needs: tuple[tuple[str, ...], ...], refuses: tuple[str, ...]) -> None:
        refused = sorted(styles.intersection(refuses))
        if refused:
            raise PlanError(
                f"transformers {self.release} refuses {refused[0]!r} in an expert plan",
                hint=f"give the experts ep_dispatch_experts and their router no entry, or {PARALLELIZE_HINT}",
                style=refused[0],
            )
        if needs and not any(styles.issuperset(names) for names in needs):
            wanted = ", or ".join(" and ".join(names) for names in needs)
            raise PlanError(
                f"transformers {self.release} would silently not apply this expert plan: it does not name {wanted}",
                hint=f"give the experts ep_dispatch_experts, or {PARALLELIZE_HINT}",
                styles=sorted(styles),
            )
