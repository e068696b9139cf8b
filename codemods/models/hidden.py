"""Assignments that put a module under an attribute in a form that is not read as one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from codemods.models.module_text import ModuleText

__all__ = ["SETS_ANY_NAME", "find_hidden_assignments"]

SETS_ANY_NAME = re.compile(rb"\bsetattr\(\s*self\s*,\s*(?![\"'f])")
_PLAIN = rb"[ \t]*self\.(?:%b(?:[ \t]*:[^=\n]+)?[ \t]*=(?!=)|(?:add_module|register_module)\()"
_SETTERS = re.compile(r"setattr|_modules|__dict__|set_submodule|add_module|register_module")


def find_hidden_assignments(module: ModuleText, attribute: str) -> Iterator[int]:
    """Yield where statements assign an attribute by name, by a tuple, after `if` on one line or on another object."""
    plain = re.compile(_PLAIN % re.escape(attribute.encode()))
    for match in re.compile(rb"[.\"']%b\b(?!\()" % re.escape(attribute.encode())).finditer(module.data):
        start = module.data.rfind(b"\n", 0, match.start()) + 1
        end = module.data.find(b"\n", match.end())
        line = module.data[start : end if end >= 0 else len(module.data)]
        if plain.match(line) or line.lstrip().startswith(b"#") or not (b"=" in line or b"(" in line):
            continue
        if _is_store(line.decode("utf-8", "replace"), attribute):
            yield start


def _is_store(line: str, attribute: str) -> bool:
    """Return whether a line may assign an attribute; one that is no statement by itself may."""
    if _SETTERS.search(line):
        return re.search(rf"[\"'](?:[\w.*]*\.)?{re.escape(attribute)}[\"']", line) is not None
    try:
        parsed = ast.parse(f"{line.strip()} pass" if line.rstrip().endswith(":") else line.strip())
    except SyntaxError:
        return re.search(rf"\.{re.escape(attribute)}\b[\w.,() ]* = ", line) is not None
    extended = {id(node.target) for node in ast.walk(parsed) if isinstance(node, ast.AugAssign)}
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and _names_attribute(node, attribute)
        and (id(node) not in extended or ast.unparse(node.value) == "self")  # `cache.layers += […]` makes no module
        for node in ast.walk(parsed)
    )


def _names_attribute(node: ast.Attribute, attribute: str) -> bool:
    """Return whether an assignment's target is an attribute, or its forward: `layer.experts.forward`."""
    inner = node.value
    return node.attr == attribute or (isinstance(inner, ast.Attribute) and inner.attr == attribute)
