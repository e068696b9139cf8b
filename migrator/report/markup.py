"""HTML as values: text is always escaped when it becomes part of an element, here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from migrator.terminal.text import sanitize

__all__ = ["Child", "Html", "element", "fragment", "table"]

_VOID_TAGS = frozenset(("meta", "link", "br"))
_MAX_TEXT_LENGTH = 10**6


@dataclass(frozen=True, slots=True)
class Html:
    """A part of a page; only functions that escape text make it."""

    text: str


Child = Html | str
"""A child of an element: another element, or text."""


def element(tag: str, /, *children: Child, **attributes: str | int) -> Html:
    """Return an element; attribute names have `_` for `-`, and end with `_` if they are Python keywords."""
    names = ((name.rstrip("_").replace("_", "-"), str(value)) for name, value in attributes.items())
    opening = "".join([f"<{tag}", *(f' {name}="{_escape(value)}"' for name, value in names), ">"])
    return Html(opening if tag in _VOID_TAGS else f"{opening}{fragment(children).text}</{tag}>")


def fragment(children: Iterable[Child]) -> Html:
    """Return children one after the other, without an element around them."""
    return Html("".join(child.text if isinstance(child, Html) else _escape(child) for child in children))


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Child]]) -> Html:
    """Return a table that a narrow window shows as one block per row, with each cell labelled by its column.

    The explicit roles keep it a table for screen readers when CSS displays it as blocks.
    """
    heads = (element("th", name, scope="col", role="columnheader") for name in columns)
    return element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *heads, role="row"), role="rowgroup"),
        element("tbody", *(_row(columns, row) for row in rows), role="rowgroup"),
        role="table",
    )


def _row(columns: Sequence[str], row: Sequence[Child]) -> Html:
    first, *others = zip(columns, row, strict=True)
    head = element("th", element("span", first[1]), scope="row", role="rowheader", data_label=first[0])
    cells = (element("td", element("span", cell), role="cell", data_label=name) for name, cell in others)
    return element("tr", head, *cells, role="row")


def _escape(text: str) -> str:
    return escape(sanitize(text, _MAX_TEXT_LENGTH), quote=True)
