"""The shard map: each way in which tensors lie on ranks, drawn as strips of labelled slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from migrator.report.markup import Child, Html, element, fragment
from migrator.report.values import Mapped, MeshView
from migrator.shown import dims, visible
from runtime.inspecting.slices import Slice

__all__ = ["rank_list", "shard_map"]

_SLICES = 256
_NAMES = 24
_IN_LINE = 8
_PATTERNS = 8


def shard_map(view: MeshView) -> Html:
    """Return the maps of a mesh, one for each way in which tensors lie on its ranks."""
    world = len(view.rank_bytes)
    return element("div", *(_mapped(one, world) for one in view.maps), class_="maps")


def rank_list(ranks: Sequence[int], world: int) -> str:
    """Return ranks in words, `ranks 0–3, 8`."""
    if len(ranks) == world:
        return "every rank" if world > 1 else "rank 0"
    runs = [list(run) for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    words = (f"{run[0][1]}–{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(words)}"


def _mapped(one: Mapped, world: int) -> Html:
    idle = sorted(set(range(world)) - {rank for piece in one.slices for rank in piece.ranks})
    note = [element("p", f"{rank_list(idle, world)}: nothing of it", class_="idle")] if idle and one.slices else []
    return element("figure", element("figcaption", *_caption(one)), *_strips(one, world), *note)


def _caption(one: Mapped) -> Iterator[Html]:
    named = [element("li", element("code", visible(name))) for name in one.names[:_NAMES]]
    if len(one.names) > _NAMES:
        named.append(element("li", f"and {len(one.names) - _NAMES:,} more"))
    words = f"{one.placement} of {dims(one.shape)}" if one.shape else one.placement
    yield element("p", element("strong", words))
    yield element("ul", *named, class_="names")


def _strips(one: Mapped, world: int) -> Iterator[Html]:
    """Yield a strip for each range of the outer tensor dim that is cut, one where no more than one dim is."""
    cut = [dim for dim in range(len(one.shape)) if len({piece.bounds[dim] for piece in one.slices}) > 1]

    def outer(piece: Slice) -> list[tuple[int, int]]:
        return [piece.bounds[dim] for dim in cut[:-1]]

    shown = sorted(one.slices[:_SLICES], key=lambda piece: [piece.bounds[dim] for dim in cut])
    for where, pieces in groupby(shown, outer):
        bounds = zip(cut, where, strict=False)
        titles = [element("p", f"dim {dim}, {_range(bound)}", class_="where") for dim, bound in bounds]
        yield element("div", *titles, _strip(one, cut[-1] if cut else None, list(pieces), world), class_="row")
    if len(one.slices) > _SLICES:
        yield element("p", f"and {len(one.slices) - _SLICES:,} more slices", class_="idle")


def _strip(one: Mapped, along: int | None, pieces: Sequence[Slice], world: int) -> Html:
    if along is None:
        return _list(pieces, None, world)
    where = element("p", f"along dim {along}", class_="where")
    if along != one.packed_dim:
        return fragment([where, _list(pieces, along, world)])
    return fragment([where, element("div", *_parts(one, along, pieces, world), class_="parts")])


def _parts(one: Mapped, along: int, pieces: Sequence[Slice], world: int) -> Iterator[Html]:
    """Yield a strip for each of the tensors that are packed one after the other."""
    size = one.shape[along] // len(one.parts)
    for number, part in groupby(pieces, lambda piece: piece.bounds[along][0] // size):
        name = element("p", one.parts[number], class_="part")
        yield element("div", name, _list(list(part), along, world), class_="packed")


def _list(pieces: Sequence[Slice], along: int | None, world: int) -> Html:
    """Return slices as long as they are, or, where they take several lines, all of one length."""
    drawn = (_slice(piece, along, world) for piece in pieces)
    return element("ol", *drawn, class_="strip many" if len(pieces) > _IN_LINE else "strip")


def _slice(piece: Slice, along: int | None, world: int) -> Html:
    start, stop = piece.bounds[along] if along is not None else (0, 1)
    pattern = f"slice p{piece.ranks[0] % _PATTERNS}" if len(piece.ranks) < world else "slice"
    words: list[Child] = [element("b", rank_list(piece.ranks, world))]
    if along is not None:
        words += [" ", element("span", _range((start, stop)))]
    return element("li", *words, class_=pattern, style=f"flex-grow:{stop - start}")


def _range(bounds: tuple[int, int]) -> str:
    return f"[{bounds[0]}:{bounds[1]}]"
