"""Every hint of the checkpoint side is asserted by a test."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("runtime/checkpoint", "runtime/loader", "runtime/validation", "runtime/formats.py")
SOURCES += ("runtime/hub.py", "runtime/hub_files.py", "runtime/remote.py", "runtime/store.py")


def find_hints(source: str) -> Iterator[str]:
    """Yield the hints of a module: each text that is passed as `hint`, by name or by position."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    positions = dict(_find_positions(tree))
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            passed = [keyword.value for keyword in call.keywords if keyword.arg == "hint"]
            for value in [*passed, *call.args[positions.get(called, len(call.args)) :][:1]]:
                yield from _find_texts(value, constants)


def _find_positions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
            if "hint" in names:
                yield node.name, names.index("hint")


def _find_texts(value: ast.expr, constants: Mapping[str, ast.expr]) -> Iterator[str]:
    """Yield the texts that an expression may become; of an f-string, its longest constant part."""
    match value:
        case ast.Constant(value=str(text)):
            yield _normalize(text)
        case ast.Name(id=name) if name in constants:
            yield from _find_texts(constants[name], {})
        case ast.IfExp(body=body, orelse=other):
            yield from (text for branch in (body, other) for text in _find_texts(branch, constants))
        case ast.JoinedStr() | ast.BinOp():
            parts = [node.value for node in ast.walk(value) if isinstance(node, ast.Constant)]
            texts = [text for part in parts if isinstance(part, str) if (text := _normalize(part))]
            yield from sorted(texts, key=len)[-1:]


def _normalize(text: str) -> str:
    """Return a text as the command line shows it, with options for arguments, and without the escapes of patterns."""
    shown = re.sub(r"`([a-z_]+)`", lambda match: "--" + match[1].replace("_", "-"), text.replace("\\", ""))
    return " ".join(shown.split())


def find_asserted(source: str) -> Iterator[str]:
    """Yield the pieces of a test module's strings: patterns may match a message before the hint."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from filter(None, map(_normalize, re.split(r"\||\n|\.\*|hint: ", node.value)))


def find_asserted_hints(pieces: Iterable[str], hints: Collection[str]) -> set[str]:
    """Return the hints that pieces of tests have at least four words of from the start, or three words that are in it.

    A piece counts for the hint that it shares most with; one that several hints could have says nothing of any.
    """
    beginnings = {hint: " ".join(hint.split()[:4]) for hint in hints}
    asserted: set[str] = set()
    for piece in pieces:
        shared = {
            hint: len(piece) if piece in hint else _count_shared(piece, hint)
            for hint, beginning in beginnings.items()
            if beginning in piece or (piece.count(" ") > 1 and piece in hint)
        }
        best = [hint for hint, count in shared.items() if count == max(shared.values())]
        whole = [hint for hint in best if hint in piece]
        asserted.update(best if len(best) == 1 else whole)
    return asserted


def _count_shared(piece: str, hint: str) -> int:
    start = piece.index(" ".join(hint.split()[:4]))
    pairs = zip(piece[start:], hint, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def test_hints_are_found_however_they_are_passed() -> None:
    source = (
        '_HINT = "in a constant"\n'
        "def fail(what, hint): raise E(what, hint=hint)\n"
        "class A:\n"
        "    def _error(self, what, hint): raise E(what, hint=hint)\n"
        "raise E(text, hint=_HINT)\n"
        'raise E(text, hint="one" if x else f"the longest part of {x} it")\n'
        'fail("what", "by position")\n'
        'self._error("what", "by position of a method")\n'
    )
    assert set(find_hints(source)) == {
        "in a constant", "one", "the longest part of", "by position", "by position of a method",
    }  # fmt: skip


def test_a_hint_without_a_test_is_found() -> None:
    pieces = find_asserted('match = "message x.*hint: copy the files,"\nhint == "use more ranks | save it in hub form"')
    hints = {
        "copy the files",
        "copy the files, or others",
        "use more ranks",
        "save it in hub form, too",
        "save it in hub form",
    }
    assert find_asserted_hints(pieces, hints) == {"copy the files, or others", "use more ranks", "save it in hub form"}
    assert find_asserted_hints(["save it in"], hints) == set()


def test_every_hint_is_asserted() -> None:
    sources = [ROOT / name for name in SOURCES]
    paths = [path for source in sources for path in ([source] if source.is_file() else source.rglob("*.py"))]
    hints = {hint for path in paths for hint in find_hints(path.read_text("utf-8"))}
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    asserted = find_asserted_hints({piece for path in tests for piece in find_asserted(path.read_text("utf-8"))}, hints)
    assert hints - asserted == set()
