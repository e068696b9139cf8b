"""The sections of a report, each rendered from one part of its content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from migrator.report.content import MeshView, PlanRow, Report, ReportFinding, TensorRow
from migrator.report.markup import Child, Html, element, table
from migrator.report.shard_map import draw_shard_maps
from migrator.terminal.text import format_bytes, format_shape, sanitize

__all__ = ["Section", "build_sections"]

_MAX_ROWS = 250
_MAX_RANKS = 1024
_MAX_TEXT_LENGTH = 600
_MAX_OPEN_RANKS = 64


@dataclass(frozen=True)
class Section:
    """A section of the page: the anchor for links, the heading and the elements below it."""

    anchor: str
    heading: str
    body: tuple[Html, ...]


def build_sections(report: Report) -> Iterator[Section]:
    """Yield a section for each part of a report that is not empty."""
    if report.findings:
        yield Section("findings", "Findings", (_findings(report),))
    for number, view in enumerate(report.views):
        yield Section(f"map-{number}", f"Shard map, {view.title}", (element("p", view.mesh), draw_shard_maps(view)))
    if report.views:
        yield Section("ranks", "Bytes per rank", tuple(_rank_bytes(view) for view in report.views))
    if report.plan:
        yield Section("plan", "Plan", tuple(_plan(report)))
    if report.tensors:
        yield Section("tensors", "Tensors", tuple(_tensors(report)))
    if report.timings:
        yield Section("timings", "Timings", (_timings(report.timings),))
    if report.files:
        yield Section("files", "Files", tuple(_files(report.files)))
    if report.digests:
        yield Section("digests", "Digests", tuple(_digests(report.digests)))
    if report.versions:
        yield Section("versions", "Versions", (_pairs_table("Versions", "package", "version", report.versions),))


def _findings(report: Report) -> Html:
    items = map(_finding, report.findings[:_MAX_ROWS])
    return element("ul", *items, *_note_more(len(report.findings), "finding", "li"), class_="findings")


def _finding(finding: ReportFinding) -> Html:
    subject: list[Child] = [element("code", sanitize(finding.subject)), " "] if finding.subject else []
    return element("li", element("strong", finding.severity), " ", *subject, sanitize(finding.text, _MAX_TEXT_LENGTH))


def _rank_bytes(view: MeshView) -> Html:
    most = max((*view.rank_bytes, 1))
    rows = [
        (f"rank {rank}", _format_size(size), element("meter", f"{size / most:.0%}", min=0, max=most, value=size))
        for rank, size in enumerate(view.rank_bytes[:_MAX_RANKS])
    ]
    caption = f"{view.title}: {view.mesh}"
    ranks = table(caption, ("rank", "bytes", "of the fullest"), rows)
    if len(rows) <= _MAX_OPEN_RANKS:
        return ranks
    summary = f"{view.title}: {len(view.rank_bytes):,} ranks, at most {format_bytes(most)} each"
    return element(
        "details", element("summary", summary), ranks, *_note_more(len(view.rank_bytes), "rank", "p", _MAX_RANKS)
    )


def _plan(report: Report) -> Iterator[Html]:
    titles = [view.title for view in report.views]
    change = ["change"] if len(titles) > 1 else []
    rows: list[tuple[Child, ...]] = [
        (element("code", sanitize(row.key)), *_styles(row)) for row in report.plan[:_MAX_ROWS]
    ]
    yield table("The entries of the plan", ("key", *titles, *change), rows)
    yield from _note_more(len(report.plan), "entry", "p")


def _styles(row: PlanRow) -> Iterator[str]:
    yield from (sanitize(style) if style else "–" for style in row.styles)
    if len(row.styles) > 1:
        yield _describe_change(row.styles[0], row.styles[-1])


def _describe_change(before: str | None, after: str | None) -> str:
    if before == after:
        return "same"
    return "added" if before is None else "removed" if after is None else "changed"


def _tensors(report: Report) -> Iterator[Html]:
    columns = ("tensors", "count", "dtype", "shape", *(view.title for view in report.views), "bytes")
    yield table("Tensors by name, layer numbers as *", columns, map(_tensor, report.tensors[:_MAX_ROWS]))
    rest = report.tensors[_MAX_ROWS:]
    yield from _note_more(len(report.tensors), "group", "p", suffix=f", {format_bytes(sum(row.bytes for row in rest))}")


def _tensor(row: TensorRow) -> tuple[Child, ...]:
    name = element("code", sanitize(row.name))
    return (name, f"{row.count:,}", row.dtype, format_shape(row.shape), *row.placements, _format_size(row.bytes))


def _timings(timings: Mapping[str, float]) -> Html:
    return table("Duration of each phase", ("phase", "seconds"), [(n, f"{s:.2f}") for n, s in timings.items()])


def _files(files: Mapping[str, int]) -> Iterator[Html]:
    rows = [(element("code", sanitize(name)), _format_size(size)) for name, size in islice(files.items(), _MAX_ROWS)]
    yield _wrap_in_details(f"{len(files):,} weight files", table("Weight files", ("file", "bytes of tensors"), rows))
    yield from _note_more(len(files), "file", "p")


def _digests(digests: Mapping[str, str]) -> Iterator[Html]:
    rows = [(element("code", sanitize(n)), element("code", d)) for n, d in islice(digests.items(), _MAX_ROWS)]
    yield _wrap_in_details(f"{len(digests):,} digests", table("Digests", ("tensor", "digest"), rows))
    yield from _note_more(len(digests), "digest", "p")


def _pairs_table(caption: str, first: str, second: str, values: Mapping[str, str]) -> Html:
    return table(caption, (first, second), [(sanitize(name), sanitize(value)) for name, value in values.items()])


def _wrap_in_details(title: str, body: Html) -> Html:
    return element("details", element("summary", title), body)


def _format_size(size: int) -> Html:
    return element("span", format_bytes(size), title=f"{size:,} bytes")


def _note_more(count: int, noun: str, tag: str, shown: int = _MAX_ROWS, suffix: str = "") -> Iterator[Html]:
    if count > shown:
        yield element(tag, f"and {count - shown:,} more, by {noun}{suffix}; --format json lists all", class_="idle")
