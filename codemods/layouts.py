"""Expert layouts read from a model's own modeling source, never by running it.

The guard of the param-level rewrite: `moe_tp_gate_up_colwise` is right for one layout only, and every other layout
gives shape errors at best and silently wrong numbers at worst. So the layout must be shown, not merely not denied:
the shapes of the parameters, the flags of the class's decorator, and a forward that takes gate and up apart by `chunk`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from codemods.sources import read_source
from plans.layout import ExpertLayout

__all__ = ["read_layouts"]

_EXPERT_PARAMETER = re.compile(rb"up_proj\b[^#\n]{0,80}Parameter\(")
_DECORATORS = 2000  # bytes above a class in which its decorators are looked for
_TOP_LEVEL = re.compile(rb"^(?=[@\w])", re.MULTILINE)
_PROJECTIONS = frozenset({"gate_up_proj", "up_proj", "down_proj"})

_Shapes = dict[str, tuple[str, ...]]


def read_layouts(folder: Path) -> tuple[ExpertLayout | None, ...]:
    """Return the layout of every experts class in a model folder's modeling files, None for one that is not clear.

    Args:
        folder: the model's folder, `src/transformers/models/mixtral`.
    """
    return tuple(layout for path in sorted(folder.glob("modeling_*.py")) for layout in _layouts_of_file(path))


def _layouts_of_file(path: Path) -> Iterator[ExpertLayout | None]:
    data = read_source(path).data
    seen: set[str] = set()
    for match in _EXPERT_PARAMETER.finditer(data):
        if b"#" in data[data.rfind(b"\n", 0, match.start()) + 1 : match.start()]:
            continue
        definition = _enclosing_class(data, match.start())
        if definition is None:
            yield None
        elif definition.name not in seen:
            seen.add(definition.name)
            shapes = _parameter_shapes(definition)
            if _is_experts(shapes):
                yield _layout(f"{path.name}:{definition.name}", definition, shapes)


def _is_experts(shapes: _Shapes) -> bool:
    """Say whether a class packs experts: three-dimensional parameters, and no gate of its own beside `up_proj`."""
    return "gate_proj" not in shapes and len(shapes.get("gate_up_proj", shapes.get("up_proj", ()))) != 2


def _enclosing_class(data: bytes, place: int) -> ast.ClassDef | None:
    """Parse only the class around a place: modeling files are long, and most of them is no experts class."""
    start = data.rfind(b"\nclass ", 0, place) + 1
    if not data.startswith(b"class ", start):
        return None
    following = _TOP_LEVEL.search(data, place)
    end = following.start() if following else len(data)
    try:
        parsed = ast.parse(data[_with_decorators(data, start) : end]).body
    except (SyntaxError, ValueError):
        return None
    return next((statement for statement in parsed if isinstance(statement, ast.ClassDef)), None)


def _with_decorators(data: bytes, start: int) -> int:
    """Move the start of a class up over its decorators."""
    while above := list(_TOP_LEVEL.finditer(data, max(0, start - _DECORATORS), start)):
        if not data.startswith(b"@", above[-1].start()):
            break
        start = above[-1].start()
    return start


def _parameter_shapes(definition: ast.ClassDef) -> _Shapes:
    """Return the dims of every parameter as source text: `self.NAME = nn.Parameter(torch.empty(…))` and the like.

    A parameter that is made in another way has no dims.
    """
    shapes: _Shapes = {}
    for statement in _statements(definition.body):
        match statement:
            case (
                ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"), attr=name)], value=value)
                | ast.AnnAssign(target=ast.Attribute(value=ast.Name(id="self"), attr=name), value=value)
            ) if _is_parameter(value):
                shapes[name] = _dims(value)
            case ast.Expr(
                value=ast.Call(
                    func=ast.Attribute(attr="register_parameter"), args=[ast.Constant(value=str(name)), value]
                )
            ) if not (isinstance(value, ast.Constant) and value.value is None):
                shapes[name] = _dims(value)
    return shapes


def _is_parameter(value: ast.expr | None) -> bool:
    if not isinstance(value, ast.Call):
        return False
    made = value.func
    return (made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "")) == "Parameter"


def _dims(value: ast.expr | None) -> tuple[str, ...]:
    match value:
        case ast.Call(args=[ast.Call(args=[ast.Tuple(elts=dims) | ast.List(elts=dims), *_]), *_]):
            return tuple(map(ast.unparse, dims))
        case ast.Call(args=[ast.Call(args=dims), *_]):
            return tuple(map(ast.unparse, dims))
    return ()


def _layout(where: str, definition: ast.ClassDef, shapes: _Shapes) -> ExpertLayout | None:
    flags = _decorator_flags(definition)
    packed = "gate_up_proj" in shapes
    up, down = shapes.get("gate_up_proj" if packed else "up_proj", ()), shapes.get("down_proj", ())
    biases = {name for name in shapes if name.endswith("bias")}
    if len(up) != 3 or len(down) != 3 or shapes.keys() - _PROJECTIONS - biases or not _flags_show(definition):
        return None
    factor = "2 * " if packed else ""
    found = tuple(map(_factor_first, up[1:]))
    regular, transposed = found == (factor + down[2], down[1]), found == (down[2], factor + down[1])
    concatenated = _is_concatenated(definition, flags) if packed else True
    if not (regular or transposed) or concatenated is None:
        return None
    return ExpertLayout(
        where,
        gated=packed and flags.get("has_gate", True),
        transposed=not regular or flags.get("is_transposed", False),
        concatenated=concatenated,
        biased=bool(biases) or flags.get("has_bias", False),
    )


def _factor_first(dim: str) -> str:
    """Write `x * 2` as `2 * x`."""
    return re.sub(r"^(.+) \* 2$", r"2 * \1", dim)


def _flags_show(definition: ast.ClassDef) -> bool:
    """Say whether every decorator's flags are written out, none computed or taken in from elsewhere."""
    calls = [decorator for decorator in definition.decorator_list if isinstance(decorator, ast.Call)]
    return all(
        keyword.arg is not None and isinstance(keyword.value, ast.Constant)
        for call in calls
        for keyword in call.keywords
    )


def _decorator_flags(definition: ast.ClassDef) -> dict[str, bool]:
    return {
        keyword.arg: keyword.value.value
        for decorator in definition.decorator_list
        if isinstance(decorator, ast.Call)
        for keyword in decorator.keywords
        if keyword.arg and isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool)
    }


def _is_concatenated(definition: ast.ClassDef, flags: dict[str, bool]) -> bool | None:
    """Say whether gate rows stand before up rows, by how the class takes them apart; None where it does not show.

    `gate, up = x.chunk(2, dim=-1)` means that they do, `x[..., ::2]` that they alternate; other ways to split a tensor
    in two leave it open.
    """
    steps = chunks = unclear = False
    for node in ast.walk(definition):
        match node:
            case ast.Slice(step=ast.Constant(value=2)):
                steps = True
            case ast.Call(func=ast.Attribute(attr="chunk")):
                chunks = chunks or _halves_last_dim(node)
            case ast.Call(func=ast.Attribute(attr="unbind" | "unflatten" | "split" | "tensor_split")):
                unclear = True
    if steps or not flags.get("is_concatenated", True):
        return False
    return True if chunks and not unclear else None


def _halves_last_dim(call: ast.Call) -> bool:
    dims = [*call.args[1:], *(keyword.value for keyword in call.keywords if keyword.arg == "dim")]
    halves = bool(call.args) and isinstance(call.args[0], ast.Constant) and call.args[0].value == 2
    return halves and [ast.unparse(dim) for dim in dims] == ["-1"]


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield every statement at any depth; walking expressions too would take ten times as long."""
    for statement in body:
        yield statement
        for nested in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, nested, ()))
