"""Whose state an optimizer's numbers mean: it counts parameters in their order, and only shapes can confirm a match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.tensor_map.tensor_map import Shape

__all__ = ["match_parameters"]

_MAX_STATES = 2_000_000

_State = tuple[int, ...]
"""How many parameters of each group are matched."""


def match_parameters(
    groups: Sequence[Sequence[Shape | None]], parameters: Mapping[str, Shape]
) -> list[list[list[str]]] | None:
    """Return the ways in which groups of an optimizer can be parameters of a model, at most two of them.

    Within a group, parameters have the model's order. Those of no group are frozen.

    Args:
        groups: for each group, the shape of each of its parameters, None if its state does not tell.
        parameters: the shapes of the model's parameters by name, in order.

    Returns:
        For each way, the names in each group; None if there are too many ways to follow.
    """
    end = tuple(map(len, groups))
    frozen = len(parameters) - sum(end)
    if frozen < 0:
        return []
    start = (0,) * len(groups)
    steps: list[dict[_State, list[tuple[_State, int]]]] = []
    current: dict[_State, int] = {start: 1}
    seen = 0
    for position, shape in enumerate(parameters.values()):
        origins: dict[_State, list[tuple[_State, int]]] = {}
        counts: dict[_State, int] = {}
        for state, ways in current.items():
            for follower, group in _list_followers(state, groups, shape):
                if position + 1 - sum(follower) <= frozen:
                    origins.setdefault(follower, []).append((state, group))
                    counts[follower] = min(2, counts.get(follower, 0) + ways)
        seen += len(counts)
        if seen > _MAX_STATES:
            return None
        steps.append(origins)
        current = counts
    if end not in current:
        return []
    names = list(parameters)
    first = _trace(steps, names, end, last=False)
    return [first] if current[end] == 1 else [first, _trace(steps, names, end, last=True)]


def _list_followers(state: _State, groups: Sequence[Sequence[Shape | None]], shape: Shape) -> list[tuple[_State, int]]:
    """Return the states after a parameter, each with the group that it belongs to, -1 if it is frozen."""
    followers = [(state, -1)]
    for group, rows in enumerate(groups):
        if state[group] < len(rows) and rows[state[group]] in (None, shape):
            followers.append(((*state[:group], state[group] + 1, *state[group + 1 :]), group))
    return followers


def _trace(
    steps: Sequence[Mapping[_State, list[tuple[_State, int]]]], names: Sequence[str], end: _State, *, last: bool
) -> list[list[str]]:
    """Return the names in each group along one way, which at every fork takes the first origin or the last one."""
    chosen: list[list[str]] = [[] for _ in end]
    state = end
    for name, origins in zip(reversed(names), reversed(steps), strict=True):
        state, group = origins[state][-1 if last else 0]
        if group >= 0:
            chosen[group].append(name)
    return [list(reversed(group)) for group in chosen]
