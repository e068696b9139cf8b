"""Forwards that count heads for themselves: with the number of all of them where a rank holds some.

Attention that reshapes its projections by `-1` and the width of a head works on whatever heads a rank holds. One that
says `view(batch, length, self.num_heads, self.head_dim)` mixes tokens with heads, often without an error. Its source
tells the two apart; it is read and never run, and what cannot be read is not judged.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from plans.dialect import Dialect
from plans.errors import PlanError
from plans.placement import Replicate
from plans.plan import find_key
from runtime.checks.blocks import LinearGroup, find_planned_placement, read_linear_groups
from runtime.styles.registry import StyleRegistry
from runtime.styles.style import HEAD_PARAMETERS, get_owner_kind

__all__ = ["check_head_counts", "check_sharded_head_parameters"]


_HEAD_COUNT_NAME = re.compile(r"(num|n)_(\w+_)?heads?|heads|nheads?")
_SHAPING_METHODS = frozenset({"narrow", "reshape", "split", "unflatten", "view"})


def check_head_counts(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> None:
    """Refuse to cut the projections of an attention that reshapes by the number of all heads.

    Args:
        model: on meta or not.
        plan: key to style.
        dialect: that it is written in.

    Raises:
        PlanError: the forward of a block whose layers leave heads sharded does so; names both.
    """
    blocks = [block for block in read_linear_groups(model, plan, dialect).values() if block.column_parallel_layers]
    counts = {kind: find_head_count(kind) for kind in {type(block.module) for block in blocks}}
    for block in blocks:
        found = counts[type(block.module)]
        if found is not None:
            raise PlanError(
                f"{block.column_parallel_layers[0].name} leaves its output sharded, but {type(block.module).__name__} shapes it by "
                f"{found}, the number of all heads, where a rank has some",
                hint=f"give no entries to the layers of {block.name}, or gather them: 'colwise_gather_output', and "
                "'rowwise_split_input' for the one behind",
                module=block.name,
            )


def find_head_count(module_class: type) -> str | None:
    """Return the number of heads, as the source spells it, by which a class's forward shapes or slices a tensor.

    Args:
        module_class: of module; its own methods that `forward` calls are read too.
    """
    methods: dict[str, ast.FunctionDef] = {}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        tree = None if name in methods else _parse_source(getattr(module_class, name, None))
        if tree is not None:
            methods[name] = tree
            waiting += list(_find_called_methods(tree))
    return next((found for tree in methods.values() for found in _find_shaping_counts(tree)), None)


def _parse_source(function: Callable[..., object] | None) -> ast.FunctionDef | None:
    """Return a function's source as a tree, None for what torch wrote or no file holds."""
    if not inspect.isfunction(function) or function.__module__.startswith("torch."):
        return None
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _find_called_methods(tree: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_self(node.func.value):
            yield node.func.attr


def _find_shaping_counts(tree: ast.FunctionDef) -> Iterator[str]:
    given = _find_count_parameters(tree)
    names = dict(_find_count_variables(tree, given)) | {name: name for name in given}
    for node in ast.walk(tree):
        for size in _get_shape_arguments(node):
            for part in ast.walk(size):
                spelled = names.get(part.id) if isinstance(part, ast.Name) else _read_head_count(part)
                if spelled is not None:
                    yield spelled


def _find_count_parameters(tree: ast.FunctionDef) -> frozenset[str]:
    """Return the parameters that a function's caller gives a number of heads by."""
    return frozenset(one.arg for one in tree.args.args if _HEAD_COUNT_NAME.fullmatch(one.arg))


def _find_count_variables(tree: ast.FunctionDef, count_parameters: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield the local names that stand for a number of heads, or for what is computed from it alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute | ast.BinOp | ast.Tuple):
            found = [spelled for part in ast.walk(node.value) if (spelled := _read_head_count(part, count_parameters))]
            for name in (part for target in node.targets for part in ast.walk(target)):
                if found and isinstance(name, ast.Name):
                    yield name.id, found[0]


def _get_shape_arguments(node: ast.AST) -> list[ast.expr]:
    """Return the sizes that a node shapes or slices a tensor by."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SHAPING_METHODS:
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.Slice):
        return [bound for bound in (node.lower, node.upper) if bound is not None]
    return []


def _read_head_count(node: ast.AST, count_parameters: frozenset[str] = frozenset()) -> str | None:
    """Return how a node spells a number of heads, held by a module or its config or given; None for other nodes."""
    of_module = isinstance(node, ast.Attribute) and _HEAD_COUNT_NAME.fullmatch(node.attr)
    return ast.unparse(node) if of_module or (isinstance(node, ast.Name) and node.id in count_parameters) else None


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


ParameterShape = tuple[str, tuple[int, ...]]
"""A parameter's own name and its shape."""


def check_sharded_head_parameters(
    model: nn.Module, plan: Mapping[str, str], dialect: Dialect, styles: StyleRegistry
) -> None:
    """Refuse to let a module work with its pieces of parameters where its input is whole.

    Args:
        model: on meta or not.
        plan: key to style.
        dialect: that it is written in.
        styles: by name.

    Raises:
        PlanError: nothing beside the module leaves heads sharded, or they would not fit the pieces.
    """
    if getattr(model, "config", None) is None:
        return
    blocks = read_linear_groups(model, plan, dialect)
    for name, module in model.named_modules():
        key = find_key(plan, name, is_parameter=False)
        if (
            key is not None
            and HEAD_PARAMETERS in styles.style(plan[key], key).own
            and get_owner_kind(module) == "module"
        ):
            block = blocks.get(name) or blocks.get(name.rpartition(".")[0])
            for own, shape in _find_sharded_parameters(name, module, plan, dialect):
                if block is None or not _is_sharded_with_heads(block, shape):
                    raise _build_sharded_parameter_error(name, own, key)


def _find_sharded_parameters(
    name: str, module: nn.Module, plan: Mapping[str, str], dialect: Dialect
) -> Iterator[ParameterShape]:
    for own, parameter in module.named_parameters(recurse=False):
        place = find_planned_placement(f"{name}.{own}", "module", parameter.ndim, plan, dialect)
        if place not in (None, Replicate()) and parameter.ndim < 3:
            yield own, tuple(parameter.shape)


def _is_sharded_with_heads(group: LinearGroup, shape: tuple[int, ...]) -> bool:
    """Say whether the rows of a parameter may be those of the heads that the block's layers leave on each rank."""
    given = {one.linear.in_features for one in group.projections if not one.has_sharded_input}
    fits = any(one.linear.out_features % shape[0] == 0 for one in group.column_parallel_layers)
    return fits and not (len(shape) == 1 and shape[0] in given)


def _build_sharded_parameter_error(name: str, parameter: str, key: str) -> PlanError:
    return PlanError(
        f"{name}.{parameter} is cut, but {name} works on what is whole on every rank: a piece would not fit it",
        hint=f"remove the entry {key!r} and that of {parameter!r}",
        module=name,
    )
