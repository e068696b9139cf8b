"""Expert layouts read from a model's own modeling source, never by running it.

This is the guard of the param-level rewrite: `moe_tp_gate_up_colwise` is right for one layout only; any other gives
shape errors at best and silently wrong numbers at worst. So the source must show the layout: the shapes of the
parameters, the flags of the class's decorator, and a forward that takes gate and up apart. A class is read with the
statements it inherits and without those it overrides; if it is changed from outside, its layout is unknown.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path

from codemods.models.concatenation import find_concatenation
from codemods.models.framework import is_framework_name
from codemods.models.model_files import find_modeling_files
from codemods.models.modeling import ModelingSource, Outside, load_modeling
from codemods.models.module_text import ClassSource, ModuleText, parse_class
from plans.model_facts import ExpertLayout, KeyTarget, UnreadLayout

__all__ = ["explain_decorators", "find_layout", "list_expert_classes", "read_class_layout", "read_layouts"]

_EXPERT_PARAMETER = re.compile(rb"up_proj\b[^#\n]{0,80}Parameter\(")
_PROJECTIONS = frozenset({"gate_up_proj", "up_proj", "down_proj"})
_SETS_ATTRIBUTE = re.compile(rb"\.\w+[ \t]*(?::[^=\n]+)?=(?!=)")
_BY_HAND = "check the layout and rewrite the entry by hand"
_METHODS = (ast.FunctionDef, ast.AsyncFunctionDef)

_Shapes = dict[str, tuple[str, ...]]
"""From parameter name to its dims as source text."""


def find_layout(folder: Path, target: KeyTarget | None) -> ExpertLayout | None:
    """Return the layout of the experts that a key names in one model, None where the source does not show it.

    Args:
        folder: the model's folder.
        target: what the experts' key names; if None, the folder's only experts class is taken.
    """
    if target is None:
        layouts = read_layouts(folder)
        return layouts[0] if len(layouts) == 1 else None
    source = load_modeling(folder)
    named = (one for module in source.read_files for found in module.classes.values() for one in found)
    definition = next((one for one in named if one.where == target.where), None)
    layout = read_class_layout(source, definition) if definition else None
    return layout if isinstance(layout, ExpertLayout) else None


def read_layouts(folder: Path, plan_file: Path | None = None) -> tuple[ExpertLayout | None, ...]:
    """Return the layout of every experts class in a model's own files, None for one that is unclear.

    Args:
        folder: the model's folder, `src/transformers/models/mixtral`.
        plan_file: the file with the plan, which may define the experts itself.

    Raises:
        SourceError: a modeling file cannot be read.
    """
    if not find_modeling_files(folder, plan_file):
        return ()
    source = load_modeling(folder, plan_file)
    layouts = [read_class_layout(source, one) if one else UnreadLayout("", "") for one in list_expert_classes(source)]
    return tuple(one if isinstance(one, ExpertLayout) else None for one in layouts if one is not None)


def list_expert_classes(source: ModelingSource) -> list[ClassSource | None]:
    """Return the classes of the model's own files that may pack experts, None for parameters outside of classes."""
    found = dict.fromkeys(one for module in source.files.values() for one in _find_packing_classes(module))
    classes = [one for module in source.files.values() for named in module.classes.values() for one in named]
    size = 0
    while size < len(found):
        size = len(found)
        names = {one.name for one in found if one}
        found |= {one: None for one in classes if any(base.rpartition(".")[2] in names for base in one.bases)}
    return list(found)


@lru_cache(maxsize=1024)
def read_class_layout(source: ModelingSource, definition: ClassSource) -> ExpertLayout | UnreadLayout | None:
    """Return the layout of a class, None if it packs no experts.

    Args:
        source: the model's source.
        definition: the class.
    """
    ancestry = source.find_ancestry(definition)
    parsed = [(ancestor, one) for ancestor in ancestry.classes if (one := parse_class(ancestor)) is not None]
    if len(parsed) < len(ancestry.classes):
        return UnreadLayout(f"{definition.where} cannot be parsed", "correct its syntax")
    nodes = [one.node for _, one in parsed]
    body = _collect_effective_statements(nodes)
    shapes = _read_parameter_shapes(body)
    if not _is_experts(shapes):
        return None
    if shapes.keys().isdisjoint(_PROJECTIONS):
        return UnreadLayout(
            f"{definition.where} stacks no experts in `gate_up_proj`", f"correct the key, or {_BY_HAND}"
        )
    other_bases = (f"its base `{one}` is no plain module" for one in ancestry.external if not _is_plain_base(one))
    if unknown := next(chain(ancestry.unknown, other_bases), ""):
        return UnreadLayout(f"{definition.where}: {unknown}", f"bring the base into the tree, or {_BY_HAND}")
    outside = (reason for one in ancestry.classes for reason in _explain_outside_changes(source, one))
    if reason := next(outside, next(explain_decorators(source, ancestry.classes), None)):
        return UnreadLayout(reason, _BY_HAND)
    flags = _read_flags(nodes)
    if flags is None:
        return UnreadLayout(
            f"{definition.where} has a decorator with a computed or a positional flag",
            f"write it as `name=True`, or {_BY_HAND}",
        )
    found = find_concatenation(body, flags, [ancestor.name for ancestor in ancestry.classes], _find_half(shapes))
    layout = _build_layout(definition.where, shapes, flags, found.shown)
    if layout is not None:
        return layout
    if cause := _explain_shapes(definition, shapes):
        return UnreadLayout(cause, _BY_HAND)
    owner, one = next((each for each in parsed if found.statement in each[1].node.body), parsed[0])
    line = f"{owner.path.name}:{one.lines_above + found.line}" if found.line else definition.where
    return UnreadLayout(f"{line} {found.reason}", f"take gate from up by `chunk(2, dim=-1)`, or {_BY_HAND}")


def explain_decorators(source: ModelingSource, classes: Iterable[ClassSource]) -> Iterator[str]:
    """Yield why decorators of classes may put something else in their place."""
    for definition in classes:
        parsed = parse_class(definition)
        for decorator in parsed.node.decorator_list if parsed else ():
            name = ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)
            for meaning in source.resolve(definition.path, name):
                known = isinstance(meaning, Outside) and is_framework_name(meaning.dotted, "decorators")
                if not known or (isinstance(meaning, Outside) and meaning.reason):
                    line = parsed.lines_above + decorator.lineno if parsed else 0
                    what = f"decorates {definition.name} with `{name}`, which may replace its code"
                    yield f"{definition.path.name}:{line} {what}"


def _find_half(shapes: _Shapes) -> str:
    """Return the text of half the packed dim: `self.width` for `2 * self.width`, empty where it does not show."""
    halves = [dim[4:] for dim in map(_normalize_factor, shapes.get("gate_up_proj", ())) if dim.startswith("2 * ")]
    return halves[0] if len(halves) == 1 else ""


def _explain_shapes(definition: ClassSource, shapes: _Shapes) -> str | None:
    """Return why shapes fit no layout, None if they fit one."""
    up = "gate_up_proj" if "gate_up_proj" in shapes else "up_proj"
    for name in (up, "down_proj"):
        if len(shapes.get(name, ())) != 3:
            what = "creates no three-dimensional" if not shapes.get(name) else "does not show three dims for"
            return f"{definition.where} {what} `{name}`"
    biases = {name for name in shapes if name.endswith("bias")}
    if others := sorted(shapes.keys() - _PROJECTIONS - biases):
        return f"{definition.where} has another parameter, `{others[0]}`"
    dims = {name: f"[{', '.join(shapes[name])}]" for name in (up, "down_proj")}
    if _build_layout("", shapes, {}, True) is None:
        return f"{definition.where} gives `{up}` the dims {dims[up]} and `down_proj` {dims['down_proj']}"
    return None


def _find_packing_classes(module: ModuleText) -> Iterator[ClassSource | None]:
    """Yield the classes that create packed parameters, None for a parameter outside of classes."""
    for match in _EXPERT_PARAMETER.finditer(module.data):
        if b"#" not in module.data[module.data.rfind(b"\n", 0, match.start()) + 1 : match.start()]:
            classes = (one for named in module.classes.values() for one in named)
            yield next((one for one in classes if one.start < match.start() < one.end), None)


def _explain_outside_changes(source: ModelingSource, definition: ClassSource) -> Iterator[str]:
    """Yield the lines that change a class from outside: `ToyExperts.forward = …`."""
    for module in source.read_files:
        offset = _find_patch(module.data, definition.name.encode())
        if offset is not None:
            yield f"{module.top_level.format_line(offset)} changes {definition.name} from outside"


def _find_patch(data: bytes, name: bytes) -> int | None:
    """Return where a file changes a class from outside, None if it does not."""
    for text in (b"setattr(" + name, b"\n" + name + b" = "):
        if (start := data.find(text)) >= 0:
            return start + 1
    start = data.find(name + b".")
    while start >= 0:
        if _SETS_ATTRIBUTE.match(data, start + len(name)):
            return start
        start = data.find(name + b".", start + 1)
    return None


def _is_plain_base(dotted: str) -> bool:
    return is_framework_name(dotted, "bases")


def _is_experts(shapes: _Shapes) -> bool:
    """Return whether a class packs experts: three-dimensional parameters, and no gate of its own beside `up_proj`."""
    return "gate_proj" not in shapes and len(shapes.get("gate_up_proj", shapes.get("up_proj", ()))) != 2


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
    """Return the flags of the classes' decorators, nearest first; None if a flag is computed or positional."""
    flags: dict[str, bool] = {}
    for definition in reversed(mro):
        for decorator in definition.decorator_list:
            if isinstance(decorator, ast.Call) and not all(map(_is_no_flag, decorator.args)):
                return None
            for keyword in decorator.keywords if isinstance(decorator, ast.Call) else ():
                if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
                    return None
                if isinstance(keyword.value.value, bool):
                    flags[keyword.arg] = keyword.value.value
    return flags


def _is_no_flag(argument: ast.expr) -> bool:
    """Return whether a positional argument, whose parameter is not known here, cannot be a flag."""
    return isinstance(argument, ast.Constant) and not isinstance(argument.value, (bool, int))


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
