"""Expert layouts read from a model's own modeling source, never by running it.

This is the guard of the param-level rewrite: `moe_tp_gate_up_colwise` is right for one layout only; any other gives
shape errors at best and silently wrong numbers at worst. So the source must show the layout: the shapes of the
parameters, the flags of the class's decorator, and a forward that takes gate and up apart with `chunk`. A class is read
with the statements it inherits and without those it overrides; if it is changed from outside, its layout is unknown.
"""

from __future__ import annotations

import ast
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from codemods.files.headers import scan_classes
from codemods.models.concatenation import is_concatenated
from codemods.models.modeling import ClassSource, ModelingSource, list_modeling_files, load_modeling
from plans.model_facts import ExpertLayout, KeyTarget

__all__ = ["find_layout", "read_layouts"]

_EXPERT_PARAMETER = re.compile(rb"up_proj\b[^#\n]{0,80}Parameter\(")
_DECORATOR_WINDOW = 2000  # bytes above a class that are searched for its decorators
_TOP_LEVEL = re.compile(rb"^(?=[@\w])", re.MULTILINE)
_PROJECTIONS = frozenset({"gate_up_proj", "up_proj", "down_proj"})
_PLAIN_BASES = frozenset({"Module", "ABC", "Generic", "object"})
_SETS_ATTRIBUTE = re.compile(rb"\.\w+[ \t]*(?::[^=\n]+)?=(?!=)")
_KNOWN_DECORATORS = frozenset({"use_experts_implementation", "use_kernel_forward_from_hub"})
"""Decorators that keep a class's forward, or replace it with an equivalent one."""

_METHODS = (ast.FunctionDef, ast.AsyncFunctionDef)

_Shapes = dict[str, tuple[str, ...]]
"""From parameter name to its dims as source text."""


def find_layout(folder: Path, target: KeyTarget | None) -> ExpertLayout | None:
    """Return the layout of the experts that a key names in one model, None where the source does not show it.

    Args:
        folder: the model's folder.
        target: what the experts' key names; if None, the folder's only experts class is taken.
    """
    layouts = read_layouts(folder)
    if target is not None:
        return next((layout for layout in layouts if layout is not None and layout.where == target.where), None)
    return layouts[0] if len(layouts) == 1 else None


def read_layouts(folder: Path) -> tuple[ExpertLayout | None, ...]:
    """Return the layout of every experts class in a model folder's modeling files, None for one that is unclear.

    Args:
        folder: the model's folder, `src/transformers/models/mixtral`.

    Raises:
        SourceError: a modeling file cannot be read.
    """
    if not list_modeling_files(folder):
        return ()
    source = load_modeling(folder)
    packing = dict.fromkeys(name for data in source.files.values() for name in _find_packing_classes(data))
    names = _add_subclasses(source.classes, packing) if packing else ()
    return tuple(layout for name in names for layout in _read_class_layouts(source, name))


def _find_packing_classes(data: bytes) -> Iterator[str]:
    """Yield the names of the classes that create packed parameters, empty for a parameter outside of classes."""
    offsets = [
        match.start()
        for match in _EXPERT_PARAMETER.finditer(data)
        if b"#" not in data[data.rfind(b"\n", 0, match.start()) + 1 : match.start()]
    ]
    headers = list(scan_classes(data)) if offsets else []
    for offset in offsets:
        index = bisect_left(headers, offset, key=lambda header: header.start)
        yield headers[index - 1].name if index else ""


def _add_subclasses(classes: Mapping[str, ClassSource], names: Iterable[str]) -> list[str]:
    """Return classes and those that inherit from them, however indirectly."""
    family = dict.fromkeys(names)
    size = 0
    while len(family) > size:
        size = len(family)
        family |= {name: None for name, source in classes.items() if not family.keys().isdisjoint(source.bases)}
    return list(family)


def _read_class_layouts(source: ModelingSource, name: str) -> Iterator[ExpertLayout | None]:
    """Yield the layout of a class, nothing if it packs no experts."""
    mro = source.mro(name)
    definitions = [definition for ancestor in mro if (definition := _parse_class(ancestor)) is not None]
    if not mro or len(definitions) < len(mro):
        yield None
        return
    body = _collect_effective_statements(definitions)
    shapes = _read_parameter_shapes(body)
    if _is_experts(shapes):
        flags = _read_flags(definitions)
        if flags is None or not all(_is_self_contained(source, ancestor) for ancestor in mro):
            yield None
        else:
            concatenated = is_concatenated(body, flags, [ancestor.name for ancestor in mro])
            yield _build_layout(f"{mro[0].path.name}:{name}", shapes, flags, concatenated)


def _is_self_contained(source: ModelingSource, definition: ClassSource) -> bool:
    """Return whether a class is fully described by its statements: no external base, nothing set from outside."""
    if any(_is_patched(data, definition.name.encode()) for data in source.files.values()):
        return False
    external = [base for base in definition.bases if base not in source.classes and base not in _PLAIN_BASES]
    return all(_is_module_alias(definition.data, base.encode()) for base in external)


def _is_module_alias(data: bytes, name: bytes) -> bool:
    """Return whether a file imports `torch.nn.Module` under a name."""
    pattern = rb"^from torch\.nn import [^\n]*\bModule as " + re.escape(name) + rb"\b"
    return re.search(pattern, data, re.MULTILINE) is not None


def _is_patched(data: bytes, name: bytes) -> bool:
    """Return whether a file changes a class from outside: `ToyExperts.forward = …`."""
    if b"setattr(" + name in data or b"\n" + name + b" = " in data:
        return True
    start = data.find(name + b".")
    while start >= 0:
        if _SETS_ATTRIBUTE.match(data, start + len(name)):
            return True
        start = data.find(name + b".", start + 1)
    return False


def _is_experts(shapes: _Shapes) -> bool:
    """Return whether a class packs experts: three-dimensional parameters, and no gate of its own beside `up_proj`."""
    return "gate_proj" not in shapes and len(shapes.get("gate_up_proj", shapes.get("up_proj", ()))) != 2


def _parse_class(source: ClassSource) -> ast.ClassDef | None:
    """Parse one class alone: modeling files are long and hold few experts classes."""
    following = _TOP_LEVEL.search(source.data, source.start + 1)
    end = following.start() if following else len(source.data)
    try:
        parsed = ast.parse(source.data[_include_decorators(source.data, source.start) : end]).body
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


def _collect_effective_statements(mro: Sequence[ast.ClassDef]) -> list[ast.stmt]:
    """Return the statements of a class and its bases that take effect, those of the bases first.

    A method that a nearer class overrides is left out, unless the nearer one calls it.

    Args:
        mro: the class, then its bases in the order in which Python looks attributes up.
    """
    names = {definition.name for definition in mro}
    overridden: set[str] = set()
    kept: list[list[ast.stmt]] = []
    for definition in mro:
        kept.append([node for node in definition.body if not (isinstance(node, _METHODS) and node.name in overridden)])
        if definition is not mro[-1]:
            methods = (statement for statement in kept[-1] if isinstance(statement, _METHODS))
            overridden |= {method.name for method in methods if not _calls_overridden(method, names)}
    return [statement for statements in reversed(kept) for statement in statements]


def _calls_overridden(method: ast.FunctionDef | ast.AsyncFunctionDef, classes: set[str]) -> bool:
    """Return whether a method calls the one it overrides: `super().forward(…)`, `ToyExperts.forward(self, …)`."""
    for node in ast.walk(method):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=called)):
                pass
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=called)) if owner in classes:
                pass
            case _:
                continue
        if called == method.name:
            return True
    return False


def _read_parameter_shapes(body: Iterable[ast.stmt]) -> _Shapes:
    """Return the dims of every parameter: `self.NAME = nn.Parameter(torch.empty(…))` and the like.

    A parameter that is created in another way, or is reassigned later, has no dims.
    """
    shapes: _Shapes = {}
    for statement in _walk_statements(body):
        match statement:
            case (
                ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"), attr=name)], value=value)
                | ast.AnnAssign(target=ast.Attribute(value=ast.Name(id="self"), attr=name), value=value)
            ) if _is_parameter(value) or name in shapes:
                shapes[name] = _read_dims(value) if _is_parameter(value) else ()
            case ast.Expr(
                value=ast.Call(
                    func=ast.Attribute(attr="register_parameter"), args=[ast.Constant(value=str(name)), value]
                )
            ) if not (isinstance(value, ast.Constant) and value.value is None):
                shapes[name] = _read_dims(value)
    return shapes


def _is_parameter(value: ast.expr | None) -> bool:
    match value:
        case ast.Call(func=ast.Attribute(attr="Parameter") | ast.Name(id="Parameter")):
            return True
    return False


def _read_dims(value: ast.expr | None) -> tuple[str, ...]:
    match value:
        case ast.Call(args=[ast.Call(args=[ast.Tuple(elts=dims) | ast.List(elts=dims), *_]), *_]):
            return tuple(map(ast.unparse, dims))
        case ast.Call(args=[ast.Call(args=dims), *_]):
            return tuple(map(ast.unparse, dims))
    return ()


def _read_flags(mro: Sequence[ast.ClassDef]) -> dict[str, bool] | None:
    """Return the flags of the classes' decorators, nearest first; None if a decorator or a flag cannot be read."""
    flags: dict[str, bool] = {}
    for definition in reversed(mro):
        for decorator in definition.decorator_list:
            function = decorator.func if isinstance(decorator, ast.Call) else decorator
            if ast.unparse(function).rpartition(".")[2] not in _KNOWN_DECORATORS:
                return None
            for keyword in decorator.keywords if isinstance(decorator, ast.Call) else ():
                if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
                    return None
                if isinstance(keyword.value.value, bool):
                    flags[keyword.arg] = keyword.value.value
    return flags


def _walk_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield every statement at any depth; `ast.walk` also visits expressions and takes ten times as long."""
    for statement in body:
        yield statement
        for nested in ("body", "orelse", "finalbody"):
            yield from _walk_statements(getattr(statement, nested, ()))


def _build_layout(
    where: str, shapes: _Shapes, flags: Mapping[str, bool], concatenated: bool | None
) -> ExpertLayout | None:
    packed = "gate_up_proj" in shapes
    up, down = shapes.get("gate_up_proj" if packed else "up_proj", ()), shapes.get("down_proj", ())
    biases = {name for name in shapes if name.endswith("bias")}
    if len(up) != 3 or len(down) != 3 or shapes.keys() - _PROJECTIONS - biases:
        return None
    factor = "2 * " if packed else ""
    dims = tuple(map(_normalize_factor, up[1:]))
    regular, transposed = dims == (factor + down[2], down[1]), dims == (down[2], factor + down[1])
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
    """Return `2 * x` for `x * 2`, and any other dim as it is."""
    return re.sub(r"^(.+) \* 2$", r"2 * \1", dim)
