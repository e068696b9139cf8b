"""The shard map: each way in which tensors lie on ranks, drawn as strips of labelled slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from migrator.report.content import MeshView, ShardMap
from migrator.report.markup import Child, Html, element, fragment
from migrator.terminal.text import format_shape, sanitize
from runtime.inspecting.placement import TensorSlice

__all__ = ["draw_shard_maps", "format_ranks"]

_MAX_SLICES = 256
_MAX_NAMES = 24
_MAX_SLICES_IN_LINE = 8
_PATTERN_COUNT = 8


def draw_shard_maps(view: MeshView) -> Html:
    """Return the maps of a mesh, one for each way in which tensors lie on its ranks."""
    world = len(view.rank_bytes)
    return element("div", *(_draw_map(one, world) for one in view.maps), class_="maps")


def format_ranks(ranks: Sequence[int], world_size: int) -> str:
    """Return ranks in words, `ranks 0–3, 8`."""
    if len(ranks) == world_size:
        return "every rank" if world_size > 1 else "rank 0"
    runs = [list(run) for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    words = (f"{run[0][1]}–{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(words)}"


def _draw_map(shard_map: ShardMap, world_size: int) -> Html:
    idle = sorted(set(range(world_size)) - {rank for piece in shard_map.slices for rank in piece.ranks})
    note = (
        [element("p", f"{format_ranks(idle, world_size)}: nothing of it", class_="idle")]
        if idle and shard_map.slices
        else []
    )
    return element(
        "figure", element("figcaption", *_draw_caption(shard_map)), *_draw_strips(shard_map, world_size), *note
    )


def _draw_caption(shard_map: ShardMap) -> Iterator[Html]:
    named = [element("li", element("code", sanitize(name))) for name in shard_map.names[:_MAX_NAMES]]
    if len(shard_map.names) > _MAX_NAMES:
        named.append(element("li", f"and {len(shard_map.names) - _MAX_NAMES:,} more"))
    words = f"{shard_map.placement} of {format_shape(shard_map.shape)}" if shard_map.shape else shard_map.placement
    yield element("p", element("strong", words))
    yield element("ul", *named, class_="names")


def _draw_strips(shard_map: ShardMap, world_size: int) -> Iterator[Html]:
    """Yield a strip for each range of the outer tensor dim that is cut, one where no more than one dim is."""
    cut = [dim for dim in range(len(shard_map.shape)) if len({piece.bounds[dim] for piece in shard_map.slices}) > 1]

    def outer(piece: TensorSlice) -> list[tuple[int, int]]:
        return [piece.bounds[dim] for dim in cut[:-1]]

    shown = sorted(shard_map.slices[:_MAX_SLICES], key=lambda piece: [piece.bounds[dim] for dim in cut])
    for where, pieces in groupby(shown, outer):
        bounds = zip(cut, where, strict=False)
        titles = [element("p", f"dim {dim}, {_format_range(bound)}", class_="where") for dim, bound in bounds]
        yield element(
            "div", *titles, _draw_strip(shard_map, cut[-1] if cut else None, list(pieces), world_size), class_="row"
        )
    if len(shard_map.slices) > _MAX_SLICES:
        yield element("p", f"and {len(shard_map.slices) - _MAX_SLICES:,} more slices", class_="idle")


def _draw_strip(shard_map: ShardMap, dim: int | None, slices: Sequence[TensorSlice], world_size: int) -> Html:
    if dim is None:
        return _draw_slices(slices, None, world_size)
    where = element("p", f"along dim {dim}", class_="where")
    if dim != shard_map.packed_dim:
        return fragment([where, _draw_slices(slices, dim, world_size)])
    return fragment([where, element("div", *_draw_parts(shard_map, dim, slices, world_size), class_="parts")])


def _draw_parts(shard_map: ShardMap, dim: int, slices: Sequence[TensorSlice], world_size: int) -> Iterator[Html]:
    """Yield a strip for each of the tensors that are packed one after the other."""
    size = shard_map.shape[dim] // len(shard_map.parts)
    for number, part in groupby(slices, lambda piece: piece.bounds[dim][0] // size):
        name = element("p", shard_map.parts[number], class_="part")
        yield element("div", name, _draw_slices(list(part), dim, world_size), class_="packed")


def _draw_slices(slices: Sequence[TensorSlice], dim: int | None, world_size: int) -> Html:
    """Return slices as long as they are, or, where they take several lines, all of one length."""
    drawn = (_draw_slice(piece, dim, world_size) for piece in slices)
    return element("ol", *drawn, class_="strip many" if len(slices) > _MAX_SLICES_IN_LINE else "strip")


def _draw_slice(rank_slice: TensorSlice, dim: int | None, world_size: int) -> Html:
    start, stop = rank_slice.bounds[dim] if dim is not None else (0, 1)
    pattern = f"slice p{rank_slice.ranks[0] % _PATTERN_COUNT}" if len(rank_slice.ranks) < world_size else "slice"
    words: list[Child] = [element("b", format_ranks(rank_slice.ranks, world_size))]
    if dim is not None:
        words += [" ", element("span", _format_range((start, stop)))]
    return element("li", *words, class_=pattern, style=f"flex-grow:{stop - start}")


def _format_range(bounds: tuple[int, int]) -> str:
    return f"[{bounds[0]}:{bounds[1]}]"
