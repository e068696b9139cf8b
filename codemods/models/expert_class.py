"""What an experts class says of its parameters, read from its statements and those it inherits."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Shapes", "collect_effective_statements", "read_flags", "read_parameter_shapes"]

Shapes = dict[str, tuple[str, ...]]
"""The dims of parameters by name, as source text."""

_DECORATORS = frozenset({"use_experts_implementation", "use_kernel_forward_from_hub"})
"""Those that leave a class's forward as it is written, or put one in its place that does the same."""


def collect_effective_statements(mro: Sequence[ast.ClassDef]) -> list[ast.stmt]:
    """Return what of a class and its bases takes effect, bases first.

    A method that a nearer class overrides counts only where the nearer one calls it.

    Args:
        mro: the class, then its bases in the order in which Python looks attributes up.
    """
    names = {definition.name for definition in mro}
    hidden: set[str] = set()
    kept: list[list[ast.stmt]] = []
    for definition in mro:
        kept.append([one for one in definition.body if not (_is_function(one) and _name(one) in hidden)])
        if definition is not mro[-1]:  # it hides nothing of any other
            hidden |= {_name(one) for one in kept[-1] if _is_function(one) and not _calls_overridden(one, names)}
    return [statement for statements in reversed(kept) for statement in statements]


def _is_function(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef))


def _name(function: ast.stmt) -> str:
    return str(getattr(function, "name", ""))


def _calls_overridden(function: ast.stmt, classes: set[str]) -> bool:
    """Say whether a method calls the one it overrides: `super().forward(…)`, `ToyExperts.forward(self, …)`."""
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=called)):
                pass
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=called)) if owner in classes:
                pass
            case _:
                continue
        if called == _name(function):
            return True
    return False


def read_parameter_shapes(body: Iterable[ast.stmt]) -> Shapes:
    """Return the dims of every parameter as source text: `self.NAME = nn.Parameter(torch.empty(…))` and the like.

    A parameter that is made in another way, or is made something else later, has no dims.
    """
    shapes: Shapes = {}
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
    if not isinstance(value, ast.Call):
        return False
    made = value.func
    return (made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "")) == "Parameter"


def _read_dims(value: ast.expr | None) -> tuple[str, ...]:
    match value:
        case ast.Call(args=[ast.Call(args=[ast.Tuple(elts=dims) | ast.List(elts=dims), *_]), *_]):
            return tuple(map(ast.unparse, dims))
        case ast.Call(args=[ast.Call(args=dims), *_]):
            return tuple(map(ast.unparse, dims))
    return ()


def read_flags(mro: Sequence[ast.ClassDef]) -> dict[str, bool] | None:
    """Return the flags of the classes' decorators, the nearest counts; None where one is unknown, or taken in."""
    flags: dict[str, bool] = {}
    for definition in reversed(mro):
        for decorator in definition.decorator_list:
            made = decorator.func if isinstance(decorator, ast.Call) else decorator
            if ast.unparse(made).rpartition(".")[2] not in _DECORATORS:
                return None
            for keyword in decorator.keywords if isinstance(decorator, ast.Call) else ():
                if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
                    return None
                if isinstance(keyword.value.value, bool):
                    flags[keyword.arg] = keyword.value.value
    return flags


def _walk_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield every statement at any depth; walking expressions too would take ten times as long."""
    for statement in body:
        yield statement
        for nested in ("body", "orelse", "finalbody"):
            yield from _walk_statements(getattr(statement, nested, ()))
