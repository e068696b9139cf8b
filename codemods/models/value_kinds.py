"""What operations on the packed parameter evaluate to, by their text alone: products, halves, slices, other orders."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from enum import Enum

__all__ = [
    "METADATA_ATTRIBUTES",
    "TRANSPOSED",
    "TRANSPOSED_ATTRIBUTES",
    "WEIGHTS",
    "ValueKind",
    "classify_function_call",
    "classify_method_call",
    "find_sliced_part",
    "format_dotted_path",
    "is_one_item",
    "read_index",
]


class ValueKind(Enum):
    """What an expression evaluates to, as far as the packed parameter is concerned."""

    SELF = "the module"
    STACKED = "the parameter of all experts"
    STACKED_TRANSPOSED = "the parameter of all experts, each transposed"
    EXPERT = "the parameter of one expert"
    EXPERT_TRANSPOSED = "the parameter of one expert, transposed"
    PRODUCT = "a product with it, gate and up on the last dim"
    HALVES = "the two halves of a product"
    UNKNOWN = "something computed from it that may be in another order"


TRANSPOSED = {
    ValueKind.STACKED: ValueKind.STACKED_TRANSPOSED,
    ValueKind.STACKED_TRANSPOSED: ValueKind.STACKED,
    ValueKind.EXPERT: ValueKind.EXPERT_TRANSPOSED,
    ValueKind.EXPERT_TRANSPOSED: ValueKind.EXPERT,
}
WEIGHTS = tuple(TRANSPOSED)
"""The kinds that are the parameter itself."""

_PRODUCTS = {"linear": 1, "matmul": 1, "bmm": 1, "mm": 1, "einsum": 2}
"""Functions that multiply, with the position of the operand whose rows become the last dim of the result."""

METADATA_ATTRIBUTES = frozenset(
    {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_cuda", "requires_grad"}
)
"""Attributes and methods that describe a tensor and return none."""

_KEEPS_ORDER = frozenset(
    {"float", "half", "bfloat16", "double", "to", "type", "type_as", "contiguous", "clone", "detach", "clamp"}
)
"""Methods that keep the order of the elements."""

TRANSPOSED_ATTRIBUTES = frozenset({"T", "mT"})
"""Attributes that are the parameter transposed, as products need it."""

_INITIALIZERS = frozenset({"normal_", "uniform_", "zero_", "fill_", "trunc_normal_"})
"""Methods that fill a parameter with values whose order has no meaning."""

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
    kind: ValueKind, name: str, call: ast.Call, arguments: Sequence[ValueKind], half: str
) -> ValueKind | None:
    """Return what a method call on the packed parameter, or on something computed from it, evaluates to.

    Args:
        kind: what the method is called on.
        name: the method's name.
        call: the call.
        arguments: the kinds of the arguments that involve the packed parameter.
        half: the text of half the packed dim.
    """
    if arguments:
        return ValueKind.UNKNOWN
    if name in METADATA_ATTRIBUTES or (kind in WEIGHTS and name in _INITIALIZERS):
        return None
    if name in _KEEPS_ORDER:
        return kind
    if kind in WEIGHTS and _transposes_last_dims(name, call):
        return TRANSPOSED[kind]
    if name in _HALVING:
        return _classify_halving(kind, name, call.args, call.keywords, half)
    return kind if kind is ValueKind.PRODUCT and _keeps_last_dim(name, call) else ValueKind.UNKNOWN


def classify_function_call(
    name: str, call: ast.Call, operands: Sequence[ValueKind | None], half: str
) -> ValueKind | None:
    """Return what a call of a tensor function, or of another object's method, evaluates to.

    Args:
        name: the function's name.
        call: the call.
        operands: what a method is called on, if it is one, then what each argument evaluates to.
        half: the text of half the packed dim.
    """
    kinds = [kind for kind in operands if kind is not None]
    is_initializer = name.endswith("_") and "init" in format_dotted_path(call.func).split(".")
    if not kinds or is_initializer:
        return None
    if name in _HALVING and kinds == [operands[0]]:
        return _classify_halving(kinds[0], name, call.args[1:], call.keywords, half)
    position = _PRODUCTS.get(name, len(operands))
    multiplied = len(kinds) == 1 and kinds[0] in WEIGHTS and operands[position : position + 1] == kinds
    return ValueKind.PRODUCT if multiplied and (name != "einsum" or _keeps_rows_last(call)) else ValueKind.UNKNOWN


_HALVING = {"chunk": "chunks", "tensor_split": "indices_or_sections", "split": "split_size_or_sections"}
"""Functions that cut a tensor into parts, each with the name of its first argument."""

_HALF_OF_LAST_DIM = re.compile(r"[\w.]+\.(?:shape\[-1\]|size\(-1\)) // 2")

_PACKED_DIMS = {
    ValueKind.PRODUCT: ("-1",),
    ValueKind.EXPERT: ("0", "-2", ""),
    ValueKind.EXPERT_TRANSPOSED: ("-1", "1"),
    ValueKind.STACKED: ("1", "-2"),
    ValueKind.STACKED_TRANSPOSED: ("-1", "2"),
}
"""The dim that gate and up share, by what is cut; empty where it may be left out."""


def _classify_halving(
    kind: ValueKind, name: str, positional: Sequence[ast.expr], keywords: Iterable[ast.keyword], half: str
) -> ValueKind:
    """Return what a function that cuts evaluates to: halves, if it cuts the dim that gate and up share in two."""
    given = dict(zip((_HALVING[name], "dim"), positional, strict=False))
    given |= {str(keyword.arg): keyword.value for keyword in keywords}
    parts, dim = given.pop(_HALVING[name], None), given.pop("dim", None)
    if name == "split" and parts is None:
        parts = given.pop("split_size", None)
    if given or parts is None or (ast.unparse(dim) if dim else "") not in _PACKED_DIMS.get(kind, ()):
        return ValueKind.UNKNOWN
    match parts:
        case ast.List(elts=[first, second]) | ast.Tuple(elts=[first, second]) if name == "split":
            is_half = ast.unparse(first) == ast.unparse(second)
        case _:
            size = ast.unparse(parts)
            is_half = size == "2"
            if name == "split":
                is_half = size == half or _HALF_OF_LAST_DIM.fullmatch(size) is not None
    return ValueKind.HALVES if is_half else ValueKind.UNKNOWN


def find_sliced_part(kind: ValueKind, index: ast.expr) -> tuple[int, str] | None:
    """Return which part of the dim that gate and up share a slice takes, and where the parts meet.

    None if it is no such slice: `[..., :size]` and `[..., size:]` of a product, `[e, :size]` of all experts' weights.

    Args:
        kind: what is sliced.
        index: what stands between the brackets.
    """
    dims = list(index.elts) if isinstance(index, ast.Tuple) else [index]
    match kind, dims:
        case ValueKind.PRODUCT, [*before, ast.Slice() as part] if before and all(map(_takes_all, before)):
            return _read_slice(part)
        case ValueKind.EXPERT, [ast.Slice() as part, *after] if all(map(_takes_all, after)):
            return _read_slice(part)
        case ValueKind.STACKED, [first, ast.Slice() as part, *after] if all(map(_takes_all, after)):
            return _read_slice(part) if is_one_item(first) or ast.unparse(first) == ":" else None
    return None


def read_index(index: ast.expr) -> int | None:
    """Return which of two halves an index takes, None if it does not show."""
    return {"0": 0, "-2": 0, "1": 1, "-1": 1}.get(ast.unparse(index))


def _read_slice(part: ast.Slice) -> tuple[int, str] | None:
    """Return which part a slice takes and where the parts meet: `:size`, `size:`, `size : 2 * size`."""
    lower, upper = (ast.unparse(bound) if bound else "" for bound in (part.lower, part.upper))
    if part.step is not None or bool(lower and lower != "0") == bool(upper and upper not in _double(lower)):
        return None
    return (1, lower) if lower and lower != "0" else (0, upper)


def _double(size: str) -> tuple[str, ...]:
    return f"2 * {size}", f"{size} * 2"


def _takes_all(index: ast.expr) -> bool:
    return _is_ellipsis(index) or (isinstance(index, ast.Slice) and ast.unparse(index) == ":")


def _is_ellipsis(index: ast.expr) -> bool:
    return isinstance(index, ast.Constant) and index.value is ...


def is_one_item(index: ast.expr) -> bool:
    """Return whether an index takes one item."""
    return isinstance(index, (ast.Name, ast.Constant, ast.Attribute)) and not _is_ellipsis(index)


def _transposes_last_dims(name: str, call: ast.Call) -> bool:
    """Return whether a method transposes each expert's matrix."""
    return name == "t" or (name == "transpose" and tuple(map(ast.unparse, call.args)) in _LAST_DIMS)


def _keeps_last_dim(name: str, call: ast.Call) -> bool:
    """Return whether a method adds or removes a dim before the last."""
    dims = [ast.unparse(dim) for dim in (*call.args, *(keyword.value for keyword in call.keywords))]
    return name in ("squeeze", "unsqueeze") and len(dims) == 1 and dims[0] in _DIMS_BEFORE_THE_LAST


def _keeps_rows_last(call: ast.Call) -> bool:
    """Return whether the result of an `einsum` ends with a dim that only its second operand has: `"te,eoi->to"`."""
    match call.args[:1]:
        case [ast.Constant(value=str(equation))]:
            operands, _, result = equation.replace(" ", "").partition("->")
            first, _, second = operands.partition(",")
            return bool(result) and result[-1] in second and result[-1] not in first
    return False
