"""HTML as values: text that becomes part of an element is escaped, always and in one place."""

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
    """A piece of a page; made by the functions here alone, so that it holds nothing unescaped."""

    text: str


Child = Html | str
"""What elements are made of: other elements, and text."""


def element(tag: str, /, *children: Child, **attributes: str | int) -> Html:
    """Return an element; an attribute is written with `_` for `-`, and with one more at its end for Python's words."""
    names = ((name.rstrip("_").replace("_", "-"), str(value)) for name, value in attributes.items())
    opening = "".join([f"<{tag}", *(f' {name}="{_escape(value)}"' for name, value in names), ">"])
    return Html(opening if tag in _VOID_TAGS else f"{opening}{fragment(children).text}</{tag}>")


def fragment(children: Iterable[Child]) -> Html:
    """Return pieces one after the other."""
    return Html("".join(child.text if isinstance(child, Html) else _escape(child) for child in children))


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Child]]) -> Html:
    """Return a table that a narrow window shows as one block per row, each cell with its column's name.

    The roles keep it a table for those who hear it, whatever is drawn.
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
