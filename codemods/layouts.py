"""Expert layouts read from a model's own modeling source, never by running it.

The guard of the param-level rewrite: `moe_tp_gate_up_colwise` is right for one layout only, and every other layout
gives shape errors at best and silently wrong numbers at worst.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from codemods.sources import read_source
from plans.layout import ExpertLayout

__all__ = ["read_layouts"]

_EXPERT_PARAMETER = re.compile(rb"up_proj = nn\.Parameter\(")
_DECORATORS = 2000  # bytes above a class in which its decorators are looked for
_TOP_LEVEL = re.compile(rb"^(?=[@\w])", re.MULTILINE)


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
        definition = _enclosing_class(data, match.start())
        if definition is None:
            yield None
        elif definition.name not in seen:
            seen.add(definition.name)
            shapes = _parameter_shapes(definition)
            if _is_experts(shapes):
                flags = _decorator_flags(definition)
                alternating = b"::2" in data and _steps_by_two(definition)
                flags["is_concatenated"] = flags.get("is_concatenated", True) and not alternating
                yield _layout(f"{path.name}:{definition.name}", shapes, flags)


def _is_experts(shapes: dict[str, tuple[str, ...]]) -> bool:
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


def _parameter_shapes(definition: ast.ClassDef) -> dict[str, tuple[str, ...]]:
    """Return the dims of every `self.NAME = nn.Parameter(torch.empty(…))` as source text."""
    shapes: dict[str, tuple[str, ...]] = {}
    for node in _statements(definition.body):
        match node:
            case ast.Assign(
                targets=[ast.Attribute(value=ast.Name(id="self"), attr=name)],
                value=ast.Call(func=ast.Attribute(attr="Parameter"), args=[ast.Call(args=dims), *_]),
            ):
                listed = dims[0].elts if dims and isinstance(dims[0], (ast.Tuple, ast.List)) else dims
                shapes[name] = tuple(ast.unparse(dim) for dim in listed)
    return shapes


def _layout(where: str, shapes: dict[str, tuple[str, ...]], flags: dict[str, bool]) -> ExpertLayout | None:
    packed = "gate_up_proj" in shapes
    up, down = shapes.get("gate_up_proj" if packed else "up_proj", ()), shapes.get("down_proj", ())
    if len(up) != 3 or len(down) != 3:
        return None
    factor = "2 * " if packed else ""
    found = tuple(map(_factor_first, up[1:]))
    regular = found == (factor + down[2], down[1])
    transposed = found == (down[2], factor + down[1])
    if not regular and not transposed:
        return None
    return ExpertLayout(
        where,
        gated=packed and flags.get("has_gate", True),
        transposed=not regular or flags.get("is_transposed", False),
        concatenated=flags["is_concatenated"],
        biased=any(name.endswith("_bias") for name in shapes) or flags.get("has_bias", False),
    )


def _factor_first(dim: str) -> str:
    """Write `x * 2` as `2 * x`."""
    return re.sub(r"^(.+) \* 2$", r"2 * \1", dim)


def _decorator_flags(definition: ast.ClassDef) -> dict[str, bool]:
    return {
        keyword.arg: keyword.value.value
        for decorator in definition.decorator_list
        if isinstance(decorator, ast.Call)
        for keyword in decorator.keywords
        if keyword.arg and isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool)
    }


def _steps_by_two(definition: ast.ClassDef) -> bool:
    """Say whether the forward separates gate from up by `[..., ::2]`, which means that they alternate."""
    steps = (node.step for node in ast.walk(definition) if isinstance(node, ast.Slice))
    return any(isinstance(step, ast.Constant) and step.value == 2 for step in steps)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield every statement at any depth; walking expressions too would take ten times as long."""
    for statement in body:
        yield statement
        for nested in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, nested, ()))
