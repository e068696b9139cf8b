"""The local names of a function that refer to plans, and the parameters whose plans come from its callers."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from codemods.reading.expressions import is_empty, iter_bindings, split_expression
from codemods.reading.names import Function, get_identifier
from codemods.reading.scope import is_plan_attribute
from plans.plan import is_expert_parallel, plan_kind

__all__ = ["find_free_parameters", "find_local_plans", "find_object_plans", "find_written_names"]


def find_free_parameters(function: Function) -> frozenset[str]:
    """Return the parameters of a function without a default or with the default None: their callers decide."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [*zip(positional, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return frozenset(argument.arg for argument, value in pairs if value is None or ast.unparse(value) == "None")


def find_local_plans(function: Function) -> dict[str, str]:
    """Return the local names of a function that are made from a plan or written into one, with the plan's attribute.

    Names that refer to plans of two kinds are left out, and so are names that are not variables of the function, names
    that also have other values and are never written into a plan, and names of which only keys are read.
    """
    local_names = _read_local_names(function).items()
    plans = {name: plan for name, local in local_names if not is_plan_attribute(name) and (plan := local.plan)}
    return {name: plan for name, plan in plans.items() if not _gives_keys_only(function, name)}


def find_written_names(function: Function) -> frozenset[str]:
    """Return the names of a function that it writes into plans; any other name of a plan only reads it."""
    return frozenset(name for node in ast.walk(function) for name, _ in _iter_written_names(node, function.name))


def _gives_keys_only(function: Function, name: str) -> bool:
    """Return whether a variable holds a plan or nothing, and only the plan's keys are read through it.

    Whatever could change the plan or hand its styles on makes it another name of the plan:
    `tp_plan = model._tp_plan if shards else []` before `for key in tp_plan` does not.
    """
    bindings = 0
    keyed: set[int] = set()
    uses: list[ast.Name] = []
    for node in ast.walk(function):
        for target, value in iter_bindings(node):
            if isinstance(target, ast.Name) and target.id == name:
                bindings += 1
                if not _holds_plan_or_nothing(value):
                    return False
        keyed.update(id(operand) for operand in _iter_key_reads(node))
        if isinstance(node, ast.Name) and node.id == name:
            uses.append(node)
    stores = sum(isinstance(use.ctx, ast.Store) for use in uses)
    return stores == bindings and all(isinstance(use.ctx, ast.Store) or id(use) in keyed for use in uses)


def _holds_plan_or_nothing(value: ast.expr) -> bool:
    for part in split_expression(value):
        if not (is_empty(part.node) or any(True for _ in _iter_plan_reads(part.node))):
            return False
    return True


def _iter_key_reads(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the operands of a node that take at most the keys of a dict."""
    match node:
        case ast.For(iter=value) | ast.comprehension(iter=value):
            yield value
        case ast.If(test=value) | ast.While(test=value) | ast.IfExp(test=value) | ast.UnaryOp(ast.Not(), value):
            yield value
        case ast.Compare(left=left, comparators=comparators):
            yield from (left, *comparators)
        case ast.Call(func=ast.Name(id="len" | "bool" | "sorted" | "isinstance"), args=arguments):
            yield from arguments[:1]


def find_object_plans(function: Function) -> frozenset[str]:
    """Return the variables with a plan's name that only hold objects instead of names of styles.

    Training stacks name torch's plans so: `base_model_tp_plan = {"norm": SequenceParallel()}`.
    """
    values: dict[str, list[ast.expr]] = defaultdict(list)
    styled: set[str] = set()
    for node in ast.walk(function):
        for target, value in iter_bindings(node):
            if isinstance(target, ast.Name) and is_plan_attribute(target.id):
                values[target.id].append(value)
        match node:
            case (
                ast.Call(func=ast.Attribute(value=ast.Name(id=name)))
                | ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name))])
                | ast.AugAssign(target=ast.Name(id=name))
            ) if any(map(_is_style, ast.walk(node))):
                styled.add(name)
    names = (name for name, displays in values.items() if all(map(_holds_objects, displays)))
    return frozenset(names) - styled


def _is_style(node: ast.AST) -> bool:
    """Return whether a node writes the name of a style: into a display, or as the value of an item."""
    match node:
        case ast.Assign(value=ast.Constant(value=str())) | ast.keyword(value=ast.Constant(value=str())):
            return True
        case ast.Dict(values=values):
            return any(isinstance(value, ast.Constant) for value in values)
    return False


def _holds_objects(value: ast.expr) -> bool:
    """Return whether an expression is a display whose values are all calls of classes, by the case of their names."""
    return isinstance(value, ast.Dict) and bool(value.values) and all(map(_is_object, value.values))


def _is_object(value: ast.expr) -> bool:
    name = get_identifier(value.func) if isinstance(value, ast.Call) else ""
    return name[:1].isupper() and not name.isupper()


@dataclass
class _LocalName:
    """How a function uses a name.

    Args:
        assigned: whether the function assigns the name.
        has_other_value: whether one of its values is made from neither a plan nor the name itself.
        values: the plans that each of its values is made from.
        target_plans: the plans that it is written into.
    """

    assigned: bool = False
    has_other_value: bool = False
    values: set[frozenset[str]] = field(default_factory=set)
    target_plans: set[str] = field(default_factory=set)

    @property
    def plan(self) -> str | None:
        """The plan that the name refers to, or None if there is none, there are several kinds, or one after another."""
        plans = self.target_plans.union(*self.values)
        is_reused = (self.has_other_value and not self.target_plans) or len(self.values) > 1
        if not self.assigned or is_reused or len({plan_kind(plan) for plan in plans}) != 1:
            return None
        return min(plans, key=lambda plan: (not is_plan_attribute(plan), plan))


def _read_local_names(function: Function) -> Mapping[str, _LocalName]:
    names: dict[str, _LocalName] = defaultdict(_LocalName)
    for node in ast.walk(function):
        for target, value in iter_bindings(node):
            if isinstance(target, ast.Name):
                plans, local = set(_iter_plan_reads(value)), names[target.id]
                local.assigned = True
                local.has_other_value |= not (plans or _has_name(value, target.id))
                local.values |= {frozenset(plans)} if plans else set()
        for name, plan in _iter_loop_plans(node):
            names[name].assigned = True
            names[name].values.add(frozenset([plan]))
        for name, plan in _iter_written_names(node, function.name):
            names[name].target_plans.add(plan)
    return names


def _iter_written_names(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
    """Yield the names that a node writes into plans, each with the plan's attribute."""
    for plan, value in _iter_plan_writes(node, function):
        for part in split_expression(value):
            if isinstance(part.node, ast.Name):
                yield part.node.id, plan


def _iter_plan_writes(node: ast.AST, function: str) -> Iterator[tuple[str, ast.expr]]:
    """Yield what a node writes into a plan that it names: the plan's attribute, and the expression.

    Args:
        node: any node of a function.
        function: the name of the function.
    """
    for target, value in iter_bindings(node):
        if isinstance(target, ast.Attribute) and is_plan_attribute(target.attr):
            yield target.attr, value
    match node:
        case ast.AugAssign(target=ast.Attribute(attr=plan), op=ast.BitOr(), value=value) if is_plan_attribute(plan):
            yield plan, value
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr=plan), attr="update")) if is_plan_attribute(plan):
            yield plan, node
        case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value=str(plan)), value]) if plan_kind(plan):
            yield plan, value
        case ast.Call(keywords=keywords):
            yield from ((keyword.arg, keyword.value) for keyword in keywords if keyword.arg and plan_kind(keyword.arg))
        case ast.Return(value=ast.expr() as value) if plan_kind(function):
            yield function, value


def _iter_plan_reads(value: ast.AST) -> Iterator[str]:
    for part in split_expression(value):
        match part.node:
            case ast.Attribute(attr=plan) if is_plan_attribute(plan):
                yield plan
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(plan)), *_]) if plan_kind(plan):
                yield plan


def _has_name(value: ast.expr, name: str) -> bool:
    return any(isinstance(part.node, ast.Name) and part.node.id == name for part in split_expression(value))


def _iter_loop_plans(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the variable of a loop over plans with the first plan; the loop changes each of them in the same way."""
    match node:
        case ast.For(target=ast.Name(id=name), iter=ast.Tuple(elts=plans) | ast.List(elts=plans)):
            attributes = [plan for element in plans for plan in _iter_plan_reads(element)]
            if len(attributes) == len(plans) > 0 and len({is_expert_parallel(plan) for plan in attributes}) == 1:
                yield name, attributes[0]
