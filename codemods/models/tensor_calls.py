"""What calls make of the packed parameter of experts, as far as the layout guard needs to know it: data, mostly."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from enum import Enum

__all__ = [
    "FUNCTIONAL",
    "METADATA_ATTRIBUTES",
    "PURE_FUNCTIONS",
    "VIEW_ATTRIBUTES",
    "WEIGHTS",
    "ValueKind",
    "classify_function_call",
    "classify_method_call",
    "format_dotted_path",
]


class ValueKind(Enum):
    """What an expression holds of the packed parameter."""

    SELF = "the module"
    STACKED = "the parameter of all experts"
    EXPERT = "that of one expert"
    PRODUCT = "something multiplied with it, gate and up on the last dim"
    HALVES = "the two halves of that"
    UNKNOWN = "something made of it in a way that may change the order"


WEIGHTS = (ValueKind.STACKED, ValueKind.EXPERT)
"""The parameter itself."""

FUNCTIONAL = frozenset({"F", "functional", "nn.functional", "torch.nn.functional", "torch"})
"""The modules that hold functions of tensors, as models write them."""

_PRODUCTS = {"linear": 1, "matmul": 1, "bmm": 1, "mm": 1, "einsum": 2}
"""Functions that multiply, with the position of the operand whose rows make the last dim of the result."""

METADATA_ATTRIBUTES = frozenset(
    {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_cuda", "requires_grad"}
)
"""Attributes and methods that tell something of a tensor and give none."""

_KEEPS_ORDER = frozenset(
    {"float", "half", "bfloat16", "double", "to", "type", "type_as", "contiguous", "clone", "detach", "clamp"}
)
"""Methods that keep every element in its place."""

VIEW_ATTRIBUTES = frozenset({"T", "mT", "data"})
"""Attributes that are the same parameter, for a product turned around or not."""

_INITIALIZERS = frozenset({"normal_", "uniform_", "zero_", "fill_", "trunc_normal_"})
"""Methods that fill a parameter with values that have no order yet."""

PURE_FUNCTIONS = frozenset({"super", "isinstance", "hasattr", "type", "id", "len"})
"""Functions that change nothing of what they are given."""

_LAST_DIMS = frozenset({("-1", "-2"), ("-2", "-1"), ("1", "2"), ("2", "1")})
_DIMS_BEFORE_THE_LAST = frozenset({"0", "1", "-2"})


def format_dotted_path(node: ast.expr) -> str:
    """Return a dotted name as written, `nn.functional.linear`; empty for any other expression."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attribute):
            owner = format_dotted_path(value)
            return f"{owner}.{attribute}" if owner else ""
    return ""


def classify_method_call(
    kind: ValueKind, name: str, call: ast.Call, arguments: Sequence[ValueKind]
) -> ValueKind | None:
    """Return what a method gives.

    Args:
        kind: what it is called on.
        name: of the method.
        call: the call.
        arguments: what its arguments hold of the packed parameter.
    """
    if arguments:
        return ValueKind.UNKNOWN
    if name in METADATA_ATTRIBUTES or (kind in WEIGHTS and name in _INITIALIZERS):
        return None
    if name in _KEEPS_ORDER or (kind in WEIGHTS and _transposes_last_dims(name, call)):
        return kind
    if kind is ValueKind.PRODUCT and name == "chunk":
        return _classify_chunk(call.args, call.keywords)
    return kind if kind is ValueKind.PRODUCT and _keeps_last_dim(name, call) else ValueKind.UNKNOWN


def classify_function_call(name: str, call: ast.Call, operands: Sequence[ValueKind | None]) -> ValueKind | None:
    """Return what a function of tensors gives, or a method of something else.

    Args:
        name: of the function.
        call: the call.
        operands: what its arguments hold of the packed parameter, and before them what it is called on.
    """
    held = [form for form in operands if form is not None]
    is_initializer = name.endswith("_") and "init" in format_dotted_path(call.func).split(".")
    if not held or is_initializer:
        return None
    if name == "chunk" and held == [operands[0]] == [ValueKind.PRODUCT]:
        return _classify_chunk(call.args[1:], call.keywords)
    place = _PRODUCTS.get(name, len(operands))
    multiplied = len(held) == 1 and held[0] in WEIGHTS and operands[place : place + 1] == held
    return ValueKind.PRODUCT if multiplied and (name != "einsum" or _keeps_rows_last(call)) else ValueKind.UNKNOWN


def _classify_chunk(positional: Sequence[ast.expr], keywords: Iterable[ast.keyword]) -> ValueKind:
    """Return what `chunk` gives: halves, if it cuts the last dim in two."""
    given = dict(zip(("chunks", "dim"), map(ast.unparse, positional), strict=False))
    given |= {str(keyword.arg): ast.unparse(keyword.value) for keyword in keywords}
    return ValueKind.HALVES if given == {"chunks": "2", "dim": "-1"} else ValueKind.UNKNOWN


def _transposes_last_dims(name: str, call: ast.Call) -> bool:
    """Say whether a method exchanges rows and columns of each expert's matrix."""
    return name == "t" or (name == "transpose" and tuple(map(ast.unparse, call.args)) in _LAST_DIMS)


def _keeps_last_dim(name: str, call: ast.Call) -> bool:
    """Say whether a method adds or takes away a dim before the last."""
    dims = [ast.unparse(dim) for dim in (*call.args, *(keyword.value for keyword in call.keywords))]
    return name in ("squeeze", "unsqueeze") and len(dims) == 1 and dims[0] in _DIMS_BEFORE_THE_LAST


def _keeps_rows_last(call: ast.Call) -> bool:
    """Say whether an `einsum` of two operands ends with a dim that only the second one has: `"te,eoi->to"`."""
    match call.args[:1]:
        case [ast.Constant(value=str(equation))]:
            operands, _, result = equation.replace(" ", "").partition("->")
            first, _, second = operands.partition(",")
            return bool(result) and result[-1] in second and result[-1] not in first
    return False
