"""Reading the common case without a parser: files whose plans are plain dict displays in class bodies.

Parsing every file would take most of the time of a run, and nearly all files write their plans in this way. `skim`
reads such files with a few regular expressions and returns exactly what `read_module` would; if anything is unusual, it
returns None and the file is parsed. Edits are always verified by a parser. Without this module, `migrator check` on the
models of transformers takes three times as long.
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

# A class that is indented or written in an unusual way matches without a name.
_CLASS = re.compile(rb"\n(?:class (?:(\w+)(?:\(((?:[\w\t ,.=]|\n(?!(?:    )?class ))*+)\))?:)?|    class )")
_IMPORT = re.compile(
    rb"\nfrom (\.*)(\w[\w.]*)? import (?:\(((?:[\w\s,]|#[^\n]*)*+)\)|([\w ,]+))[ \t]*(?:#[^\n]*)?(?=\n)"
)
# Imports in blocks and `import … as …` of models are rare; these substrings are found ten times as fast.
_SIGNS_OF_OTHER_IMPORTS = (b" from .", b"\tfrom .", b"from.", b".models")
_OTHER_IMPORT = re.compile(
    rb"(?:\n[ \t]+|[:;][ \t]*)from[ \t]*(?:\.{1,2}(?:\w|[ \t]+import)|[\w.]*\.models\b)"
    rb"|\nfrom\.|(?:\n[ \t]*|[:;][ \t]*)import[^\n]+\.models\b"
)
_COMMENT = re.compile(rb"#[^\n]*")
_IMPORTED = re.compile(rb"(\w+)(?:\s+as\s+(\w+))?")
_PLACEHOLDER = re.compile(rb"[{}%$]")  # text that something else replaces
_COMMENT_LINE = re.compile(rb"\n[ \t]*#")  # or such a line inside a string
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
    """Return what `read_module` would return, or None if the file must be parsed."""
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
    """The classes by name, each created on first access; most classes of a tree are never accessed."""

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
    """Return whether there are triple-quoted strings with single quotes, in which text could be mistaken for code."""
    position = body.find(b"'''")
    while position >= 0:
        if not body.count(b'"""', 0, position) % 2:  # not inside a string with double quotes
            return True
        position = body.find(b"'''", position + 3)
    return False


def _read_plans(body: bytes, headers: list[re.Match[bytes]]) -> dict[str, dict[str, PlanLiteral | Opaque]] | None:
    """Return the plans by class and attribute, or None if there is any mention of a plan that cannot be read here."""
    plans: dict[str, dict[str, PlanLiteral | Opaque]] = {}
    starts = [header.start() for header in headers]
    for start, end in find_plan_mentions(body):
        line = body.rfind(b"\n", 0, start)
        if _COMMENT_LINE.match(body, line):
            continue
        index = bisect_right(starts, start) - 1
        plan = _PLAN.match(body, line)
        name = body[start:end].decode()
        if index < 0 or plan is None or plan.span("name") != (start, end) or not is_plan_attribute(name):
            return None
        if _TOP_LEVEL.search(body, headers[index].end(), start) or not _is_code(body, headers[index], plan):
            return None
        if plan["display"] and _PLACEHOLDER.search(body, plan.start("display") + 1, plan.end("display") - 1):
            return None
        owner = _get_name(headers[index])
        plans.setdefault(owner, {})[name] = _read_literal(owner, name, plan)
    return plans


def _is_code(body: bytes, header: re.Match[bytes], plan: re.Match[bytes]) -> bool:
    """Return whether a class and a plan in it are outside of strings: the number of quotes before them is even."""
    quotes = body.count(b'"""', 0, header.start())
    return quotes % 2 == 0 and body.count(b'"""', header.start(), plan.start()) % 2 == 0


def _read_literal(owner: str, attribute: str, plan: re.Match[bytes]) -> PlanLiteral | Opaque:
    # Offsets in `SourceFile.lines` are greater by one than those in `SourceFile.body`.
    if plan["display"] is None:
        return Opaque(owner, attribute, _get_line(plan.string, plan.start("name")))
    start, end = plan.span("display")
    line = _get_line(plan.string, start)
    matches = _ENTRY.finditer(plan.string, start, end)
    entries = tuple(_read_entry(match, (start, end), line) for match in matches if match[1] is not None)
    return PlanLiteral(owner, attribute, line, entries)


def _read_entry(match: re.Match[bytes], display: tuple[int, int], line: int) -> PlanEntry:
    """Return the entry of the display with the span `display`, which begins on `line`."""
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


def _get_line(body: bytes, offset: int) -> int:
    """Return the line of an offset, counted from 1: there is an additional line end before the first line."""
    return body.count(b"\n", 0, offset)


def _read_imports(source: SourceFile) -> Mapping[str, Import]:
    """Return the imports that `read_module` would return. They are read only on demand, for a few files."""
    try:
        imports = _read_plain_imports(source.lines)
    except UnicodeDecodeError:
        imports = None
    return read_module(source).imports if imports is None else imports


def _read_plain_imports(body: bytes) -> dict[str, Import] | None:
    if any(_OTHER_IMPORT.search(line) for line in _iter_suspicious_lines(body)):
        return None
    matches = list(_IMPORT.finditer(body))
    if body.count(b"\nfrom ") != len(matches):
        return None
    return {name: imported for match in matches for name, imported in _iter_imported_names(match)}


def _iter_suspicious_lines(body: bytes) -> Iterator[bytes]:
    """Yield the lines that may contain an unusual import, each with the line end before it."""
    for sign in _SIGNS_OF_OTHER_IMPORTS:
        position = body.find(sign)
        while position >= 0:
            end = body.find(b"\n", position + len(sign))
            yield body[body.rfind(b"\n", 0, position + 1) : end if end >= 0 else None]
            position = body.find(sign, end) if end >= 0 else -1


def _iter_imported_names(match: re.Match[bytes]) -> Iterator[tuple[str, Import]]:
    """Yield the names that an import binds, each with the imported object."""
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
