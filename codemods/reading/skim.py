"""The common case read without a parser: plans that are plain dict displays, class by class.

Parsing takes most of a run's time, and nearly every file writes its plans in one plain way. `skim` reads those files
with a few regular expressions to exactly what `read_module` makes of them, and answers None as soon as anything is
unusual: then the parser decides. What it reads is only ever written back through a parser.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import partial

from codemods.files.sources import SourceFile
from codemods.reading.entries import PlanEntry, is_numbered
from codemods.reading.module import ClassPlans, Import, Module, Opaque, PlanLiteral
from codemods.reading.parse import read_module
from codemods.reading.scope import find_plan_mentions, is_plan_attribute

__all__ = ["skim"]

# A class that is written or stands in an unusual way matches without a name.
_CLASS = re.compile(rb"\n(?:class (?:(\w+)(?:\(((?:[\w\t ,.=]|\n(?!(?:    )?class ))*+)\))?:)?|    class )")
_IMPORT = re.compile(
    rb"\nfrom (\.*)(\w[\w.]*)? import (?:\(((?:[\w\s,]|#[^\n]*)*+)\)|([\w ,]+))[ \t]*(?:#[^\n]*)?(?=\n)"
)
# Imports in blocks and `import … as …` of models are rare, and the signs of one are found ten times as fast.
_SIGNS_OF_OTHER_IMPORTS = (b" from .", b"\tfrom .", b"from.", b".models")
_OTHER_IMPORT = re.compile(
    rb"(?:\n[ \t]+|[:;][ \t]*)from[ \t]*(?:\.{1,2}(?:\w|[ \t]+import)|[\w.]*\.models\b)"
    rb"|\nfrom\.|(?:\n[ \t]*|[:;][ \t]*)import[^\n]+\.models\b"
)
_COMMENT = re.compile(rb"#[^\n]*")
_IMPORTED = re.compile(rb"(\w+)(?:\s+as\s+(\w+))?")
_NO_CODE = re.compile(rb"\n[ \t]*#")  # a comment, or text inside a string
_TOP_LEVEL = re.compile(rb"\n[^\s#)\]}]")
_BLANK = rb"(?:\s|#[^\n]*\n)*+"
_PAIR = rb'"([^"\\\n]*)"[ \t]*+:[ \t]*+"([^"\\\n]*)"'
_PLAN = re.compile(
    rb"\n    (?P<name>_?\w+)(?:[ \t]*:[ \t]*dict(?:\[str, str\])?)?[ \t]*=[ \t]*"
    rb"(?:(?P<display>\{" + _BLANK + rb"(?:" + _PAIR + _BLANK + rb"(?:," + _BLANK + rb"|(?=\})))*+\})"
    rb"|None|AttributeError\(\))[ \t]*(?:#[^\n]*)?(?=\r?\n)"
)
_ENTRY = re.compile(rb"#[^\n]*|" + _PAIR)


def skim(source: SourceFile) -> Module | None:
    """Return what `read_module` would, or None where only a parser can tell."""
    body = source.lines
    if b"\r" in body or _has_other_strings(body):
        return None
    headers = list(_CLASS.finditer(body))
    if any(header[1] is None for header in headers):
        return None
    try:
        plans = _read_plans(body, headers)
    except UnicodeDecodeError:
        return None
    if plans is None:
        return None
    return Module(_LazyClasses(headers, plans), partial(_read_imports, source), plan_classes=tuple(plans))


class _LazyClasses(Mapping[str, ClassPlans]):
    """Classes by name, each put together when it is asked for; most of a tree's never are."""

    def __init__(self, headers: list[re.Match[bytes]], plans: Mapping[str, dict[str, PlanLiteral | Opaque]]) -> None:
        self._bases = {_get_name(header): header[2] for header in headers}
        self._plans = plans
        self._built: dict[str, ClassPlans] = {}

    def __getitem__(self, name: str) -> ClassPlans:
        if name not in self._built:
            self._built[name] = ClassPlans(name, _parse_bases(self._bases[name]), self._plans.get(name, {}))
        return self._built[name]

    def __contains__(self, name: object) -> bool:
        return name in self._bases

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def __len__(self) -> int:
        return len(self._bases)


def _has_other_strings(body: bytes) -> bool:
    """Return whether strings over several lines, which hide what looks like code, are other than the most usual kind."""
    place = body.find(b"'''")
    while place >= 0:
        if not body.count(b'"""', 0, place) % 2:  # not inside one of the usual kind
            return True
        place = body.find(b"'''", place + 3)
    return False


def _read_plans(body: bytes, headers: list[re.Match[bytes]]) -> dict[str, dict[str, PlanLiteral | Opaque]] | None:
    """Return the plans by class and attribute; every mention of a plan must be accounted for."""
    found: dict[str, dict[str, PlanLiteral | Opaque]] = {}
    starts = [header.start() for header in headers]
    for start, end in find_plan_mentions(body):
        line = body.rfind(b"\n", 0, start)
        if _NO_CODE.match(body, line):
            continue
        index = bisect_right(starts, start) - 1
        plan = _PLAN.match(body, line)
        name = body[start:end].decode()
        if index < 0 or plan is None or plan.span("name") != (start, end) or not is_plan_attribute(name):
            return None
        if _TOP_LEVEL.search(body, headers[index].end(), start) or not _is_code(body, headers[index], plan):
            return None
        owner = _get_name(headers[index])
        found.setdefault(owner, {})[name] = _read_literal(owner, name, plan)
    return found


def _is_code(body: bytes, header: re.Match[bytes], plan: re.Match[bytes]) -> bool:
    """Return whether neither a class nor a plan in it stands inside a string: an even number of quotes is before them."""
    before = body.count(b'"""', 0, header.start())
    return before % 2 == 0 and body.count(b'"""', header.start(), plan.start()) % 2 == 0


def _read_literal(owner: str, attribute: str, plan: re.Match[bytes]) -> PlanLiteral | Opaque:
    # Places in `body` are one more than in the source's, for the line end put before it.
    if plan["display"] is None:
        return Opaque(owner, attribute, _get_line(plan.string, plan.start("name")))
    start, end = plan.span("display")
    line = _get_line(plan.string, start)
    matches = _ENTRY.finditer(plan.string, start, end)
    entries = tuple(_read_entry(match, (start, end), line) for match in matches if match[1] is not None)
    return PlanLiteral(owner, attribute, line, entries)


def _read_entry(match: re.Match[bytes], display: tuple[int, int], line: int) -> PlanEntry:
    """Return the entry of a display that stands at `display` and begins on `line`."""
    (key_start, key_end), (style_start, style_end) = match.span(1), match.span(2)
    key = match[1].decode()
    return PlanEntry(
        key,
        match[2].decode(),
        line + match.string.count(b"\n", display[0], style_start),
        (key_start - 2, key_end),
        (style_start - 2, style_end),
        (display[0] - 1, display[1] - 1),
        can_precede=True,
        numbered=is_numbered(key),
    )


def _get_line(body: bytes, place: int) -> int:
    """Return the line of a place, counted from 1; the line end put before the body makes up for the count from 0."""
    return body.count(b"\n", 0, place)


def _read_imports(source: SourceFile) -> Mapping[str, Import]:
    """Return what `read_module` would; most files are never asked."""
    try:
        found = _read_plain_imports(source.lines)
    except UnicodeDecodeError:
        found = None
    return read_module(source).imports if found is None else found


def _read_plain_imports(body: bytes) -> dict[str, Import] | None:
    if any(_OTHER_IMPORT.search(line) for line in _iter_suspicious_lines(body)):
        return None
    matches = list(_IMPORT.finditer(body))
    if body.count(b"\nfrom ") != len(matches):
        return None
    return {bound: meant for match in matches for bound, meant in _iter_imported_names(match)}


def _iter_suspicious_lines(body: bytes) -> Iterator[bytes]:
    """Yield the lines that may hold an unusual import, each after its line end."""
    for sign in _SIGNS_OF_OTHER_IMPORTS:
        place = body.find(sign)
        while place >= 0:
            end = body.find(b"\n", place + len(sign))
            yield body[body.rfind(b"\n", 0, place + 1) : end if end >= 0 else None]
            place = body.find(sign, end) if end >= 0 else -1


def _iter_imported_names(match: re.Match[bytes]) -> Iterator[tuple[str, Import]]:
    """Yield the names that an import brings in, each with what it stands for."""
    level, module, listed = len(match[1]), (match[2] or b"").decode(), match[3] or match[4]
    for name, bound in _IMPORTED.findall(_COMMENT.sub(b"", listed) if b"#" in listed else listed):
        yield (bound or name).decode(), Import(level, module, name.decode())


def _get_name(header: re.Match[bytes]) -> str:
    return header[1].decode()


def _parse_bases(listed: bytes | None) -> tuple[str, ...]:
    if not listed:
        return ()
    parts = map(str.strip, listed.decode().split(","))
    return tuple(part for part in parts if part and "=" not in part)
