"""Expert layouts read from a model's own modeling source, never by running it.

The guard of the param-level rewrite: `moe_tp_gate_up_colwise` is right for one layout only, and every other layout
gives shape errors at best and silently wrong numbers at worst. So the layout must be shown, not merely not denied:
the shapes of the parameters, the flags of the class's decorator, and a forward that takes gate and up apart by `chunk`.
A class counts as it is effective, with what it inherits and without what it overrides; one that is changed from outside
does not show it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from codemods.files.sources import SourceFile, read_source
from codemods.models.concatenation import is_concatenated
from codemods.models.expert_class import Shapes, collect_effective_statements, read_flags, read_parameter_shapes
from plans.model_facts import ExpertLayout, KeyTarget

__all__ = ["find_layout", "read_layouts"]

_EXPERT_PARAMETER = re.compile(rb"up_proj\b[^#\n]{0,80}Parameter\(")
_CLASS = re.compile(rb"\nclass (\w+)[ \t]*(?:\(([^)]*)\))?[ \t]*:")
_DECORATOR_WINDOW = 2000  # bytes above a class in which its decorators are looked for
_TOP_LEVEL = re.compile(rb"^(?=[@\w])", re.MULTILINE)
_PROJECTIONS = frozenset({"gate_up_proj", "up_proj", "down_proj"})
_PLAIN_BASES = frozenset({"Module", "ABC", "Generic", "object"})
_TYPE_ARGUMENTS = re.compile(r"\[[^\]]*\]")
_SETS_ATTRIBUTE = re.compile(rb"\.\w+[ \t]*(?::[^=\n]+)?=(?!=)")


@dataclass(frozen=True)
class _Header:
    """Where a class begins: `offset` is in its first line.

    Args:
        bases: their names, the modules before them left out.
    """

    source: SourceFile
    offset: int
    bases: tuple[str, ...]


def find_layout(folder: Path, target: KeyTarget | None) -> ExpertLayout | None:
    """Return the layout of the experts that a key names in one model, None where it does not show.

    Args:
        folder: the model's folder.
        target: what the key of the experts names; where the source does not show it, the folder's one experts class.
    """
    layouts = read_layouts(folder)
    if target is not None:
        return next((layout for layout in layouts if layout is not None and layout.where == target.where), None)
    return layouts[0] if len(layouts) == 1 else None


def read_layouts(folder: Path) -> tuple[ExpertLayout | None, ...]:
    """Return the layout of every experts class in a model folder's modeling files, None for one that is not clear.

    Args:
        folder: the model's folder, `src/transformers/models/mixtral`.
    """
    sources = [read_source(path) for path in sorted(folder.glob("modeling_*.py"))]
    makers = {name: None for source in sources for name in _find_packing_classes(source)}
    if not makers:
        return ()
    headers = {name: header for source in sources for name, header in _find_headers(source)}
    found = [_read_class_layouts(sources, headers, name) for name in _add_subclasses(headers, makers)]
    return tuple(layout for layouts in found for layout in layouts)


def _find_packing_classes(source: SourceFile) -> Iterator[str]:
    """Yield the names of the classes that make packed parameters, empty for what stands in none."""
    data = b"\n" + source.data
    for match in _EXPERT_PARAMETER.finditer(data):
        if b"#" not in data[data.rfind(b"\n", 0, match.start()) + 1 : match.start()]:
            before = data.rfind(b"\nclass ", 0, match.start())
            header = _CLASS.match(data, before) if before >= 0 else None
            yield header[1].decode("utf-8", "replace") if header else ""


def _find_headers(source: SourceFile) -> Iterator[tuple[str, _Header]]:
    for match in _CLASS.finditer(b"\n" + source.data):
        listed = _TYPE_ARGUMENTS.sub("", (match[2] or b"").decode("utf-8", "replace")).split(",")
        bases = (base.strip().rpartition(".")[2] for base in listed if "=" not in base)
        yield match[1].decode("utf-8", "replace"), _Header(source, match.start(1) - 1, tuple(filter(None, bases)))


def _add_subclasses(headers: Mapping[str, _Header], names: Iterable[str]) -> list[str]:
    """Return some classes and those that inherit from them, however indirectly."""
    found = dict.fromkeys(names)
    size = 0
    while len(found) > size:
        size = len(found)
        found |= {name: None for name, header in headers.items() if not found.keys().isdisjoint(header.bases)}
    return list(found)


def _read_class_layouts(
    sources: Iterable[SourceFile], headers: Mapping[str, _Header], name: str
) -> Iterator[ExpertLayout | None]:
    """Yield the layout of a class, nothing where it packs no experts."""
    names = _compute_mro(headers, name)
    lineage = [_parse_class(headers[one].source.data, headers[one].offset) for one in names]
    parsed = [definition for definition in lineage if definition is not None]
    if not lineage or len(parsed) < len(lineage):
        yield None
        return
    body = collect_effective_statements(parsed)
    shapes = read_parameter_shapes(body)
    if _is_experts(shapes):
        flags = read_flags(parsed)
        where = f"{headers[name].source.path.name}:{name}"
        if flags is None or not all(_is_self_contained(sources, headers, one) for one in names):
            yield None
        else:
            yield _build_layout(where, shapes, flags, is_concatenated(body, flags, names))


def _is_self_contained(sources: Iterable[SourceFile], headers: Mapping[str, _Header], name: str) -> bool:
    """Say whether a class is all that its statements say: no base from elsewhere, and nothing set from outside."""
    foreign = [base for base in headers[name].bases if base not in headers and base not in _PLAIN_BASES]
    if any(_is_patched(source.data, name.encode()) for source in sources):
        return False
    return all(_is_module(headers[name].source.data, base.encode()) for base in foreign)


def _is_module(data: bytes, name: bytes) -> bool:
    """Say whether a name is the one that a file gives `torch.nn.Module`."""
    return re.search(rb"^from torch\.nn import [^\n]*\bModule as " + name + rb"\b", data, re.MULTILINE) is not None


def _is_patched(data: bytes, name: bytes) -> bool:
    """Say whether a file gives a class other attributes than its own statements do: `ToyExperts.forward = …`."""
    if b"setattr(" + name in data or b"\n" + name + b" = " in data:
        return True
    start = data.find(name + b".")
    while start >= 0:
        if _SETS_ATTRIBUTE.match(data, start + len(name)):
            return True
        start = data.find(name + b".", start + 1)
    return False


def _compute_mro(headers: Mapping[str, _Header], name: str) -> list[str]:
    """Return a class and its bases in these files, nearest first."""
    names = [name]
    for current in names:
        names += [base for base in headers[current].bases if base not in names] if current in headers else []
    return [one for one in names if one in headers]


def _is_experts(shapes: Shapes) -> bool:
    """Say whether a class packs experts: three-dimensional parameters, and no gate of its own beside `up_proj`."""
    return "gate_proj" not in shapes and len(shapes.get("gate_up_proj", shapes.get("up_proj", ()))) != 2


def _parse_class(data: bytes, offset: int) -> ast.ClassDef | None:
    """Parse only the class whose first line a place is in: modeling files are long, and most is no experts class."""
    start = data.rfind(b"\n", 0, offset) + 1
    following = _TOP_LEVEL.search(data, offset)
    end = following.start() if following else len(data)
    try:
        parsed = ast.parse(data[_include_decorators(data, start) : end]).body
    except (SyntaxError, ValueError):
        return None
    return next((statement for statement in parsed if isinstance(statement, ast.ClassDef)), None)


def _include_decorators(data: bytes, start: int) -> int:
    """Move the start of a class up over its decorators."""
    while above := list(_TOP_LEVEL.finditer(data, max(0, start - _DECORATOR_WINDOW), start)):
        if not data.startswith(b"@", above[-1].start()):
            break
        start = above[-1].start()
    return start


def _build_layout(
    where: str, shapes: Shapes, flags: Mapping[str, bool], concatenated: bool | None
) -> ExpertLayout | None:
    packed = "gate_up_proj" in shapes
    up, down = shapes.get("gate_up_proj" if packed else "up_proj", ()), shapes.get("down_proj", ())
    biases = {name for name in shapes if name.endswith("bias")}
    if len(up) != 3 or len(down) != 3 or shapes.keys() - _PROJECTIONS - biases:
        return None
    factor = "2 * " if packed else ""
    found = tuple(map(_normalize_factor, up[1:]))
    regular, transposed = found == (factor + down[2], down[1]), found == (down[2], factor + down[1])
    if not (regular or transposed) or (packed and concatenated is None):
        return None
    return ExpertLayout(
        where,
        gated=packed and flags.get("has_gate", True),
        transposed=not regular or flags.get("is_transposed", False),
        concatenated=not packed or bool(concatenated),
        biased=bool(biases) or flags.get("has_bias", False),
    )


def _normalize_factor(dim: str) -> str:
    """Write `x * 2` as `2 * x`."""
    return re.sub(r"^(.+) \* 2$", r"2 * \1", dim)
