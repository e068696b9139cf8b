"""The shard map: each placement of tensors on ranks, drawn as strips of labelled slices."""

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
    """Return the maps of a mesh, one for each placement."""
    world_size = len(view.rank_bytes)
    return element("div", *(_draw_map(shard_map, world_size) for shard_map in view.maps), class_="maps")


def format_ranks(ranks: Sequence[int], world_size: int) -> str:
    """Return ranks in words, such as `ranks 0–3, 8`."""
    if len(ranks) == world_size:
        return "every rank" if world_size > 1 else "rank 0"
    runs = [list(run) for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    words = (f"{run[0][1]}–{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(words)}"


def _draw_map(shard_map: ShardMap, world_size: int) -> Html:
    caption = element("figcaption", *_draw_caption(shard_map))
    return element("figure", caption, *_draw_strips(shard_map, world_size), *_note_idle_ranks(shard_map, world_size))


def _note_idle_ranks(shard_map: ShardMap, world_size: int) -> Iterator[Html]:
    idle = sorted(set(range(world_size)) - {rank for tensor_slice in shard_map.slices for rank in tensor_slice.ranks})
    if idle and shard_map.slices:
        yield element("p", f"{format_ranks(idle, world_size)}: nothing of it", class_="idle")


def _draw_caption(shard_map: ShardMap) -> Iterator[Html]:
    items = [element("li", element("code", sanitize(name))) for name in shard_map.names[:_MAX_NAMES]]
    if len(shard_map.names) > _MAX_NAMES:
        items.append(element("li", f"and {len(shard_map.names) - _MAX_NAMES:,} more"))
    words = f"{shard_map.placement} of {format_shape(shard_map.shape)}" if shard_map.shape else shard_map.placement
    yield element("p", element("strong", words))
    yield element("ul", *items, class_="names")


def _draw_strips(shard_map: ShardMap, world_size: int) -> Iterator[Html]:
    """Yield a strip along the last sharded dim for each combination of slices along the sharded dims before it."""
    all_dims = range(len(shard_map.shape))
    dims = [dim for dim in all_dims if len({tensor_slice.bounds[dim] for tensor_slice in shard_map.slices}) > 1]

    def outer_bounds(tensor_slice: TensorSlice) -> list[tuple[int, int]]:
        return [tensor_slice.bounds[dim] for dim in dims[:-1]]

    drawn = sorted(shard_map.slices[:_MAX_SLICES], key=lambda tensor_slice: [tensor_slice.bounds[dim] for dim in dims])
    for outer, slices in groupby(drawn, outer_bounds):
        bounds = zip(dims, outer, strict=False)
        titles = [element("p", f"dim {dim}, {_format_range(bound)}", class_="where") for dim, bound in bounds]
        strip = _draw_strip(shard_map, dims[-1] if dims else None, list(slices), world_size)
        yield element("div", *titles, strip, class_="row")
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
    """Yield a strip for each of the tensors that are packed along a dim."""
    size = shard_map.shape[dim] // len(shard_map.parts)
    for number, part in groupby(slices, lambda tensor_slice: tensor_slice.bounds[dim][0] // size):
        name = element("p", shard_map.parts[number], class_="part")
        yield element("div", name, _draw_slices(list(part), dim, world_size), class_="packed")


def _draw_slices(slices: Sequence[TensorSlice], dim: int | None, world_size: int) -> Html:
    """Return slices with lengths in proportion to their sizes, or of equal length if they take several lines."""
    items = (_draw_slice(tensor_slice, dim, world_size) for tensor_slice in slices)
    return element("ol", *items, class_="strip many" if len(slices) > _MAX_SLICES_IN_LINE else "strip")


def _draw_slice(tensor_slice: TensorSlice, dim: int | None, world_size: int) -> Html:
    start, stop = tensor_slice.bounds[dim] if dim is not None else (0, 1)
    pattern = f"slice p{tensor_slice.ranks[0] % _PATTERN_COUNT}" if len(tensor_slice.ranks) < world_size else "slice"
    words: list[Child] = [element("b", format_ranks(tensor_slice.ranks, world_size))]
    if dim is not None:
        words += [" ", element("span", _format_range((start, stop)))]
    return element("li", *words, class_=pattern, style=f"flex-grow:{stop - start}")


def _format_range(bounds: tuple[int, int]) -> str:
    return f"[{bounds[0]}:{bounds[1]}]"
