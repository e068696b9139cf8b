"""Accounting for every mention of a plan: what no other module of this package reads is named, or holds the plan.

A plan is rewritten only if everything that can give it entries or change them is known. `statements` reads the common
forms; here are all others: bindings that are no assignments, names of plans that are computed, code in strings, and
plans that escape.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from codemods.files.sources import SourceFile
from codemods.reading.entries import read_key, span
from codemods.reading.escapes import Escape, EscapeFinder, index_parents
from codemods.reading.expressions import iter_bindings
from codemods.reading.local_names import find_free_parameters, find_object_plans
from codemods.reading.module import Conflict, StyleSource, Unresolved
from codemods.reading.names import Definitions, Function, get_identifier
from codemods.reading.plan_literals import mention_experts
from codemods.reading.scope import ANY_CLASS, Scope, find_plan_mentions, is_plan_attribute
from codemods.reading.style_flow import Carried, StyleFlow
from codemods.reading.style_reads import StyleReader
from plans.plan import plan_kind

__all__ = ["Accountant"]

_PLANS = [f"{prefix}{kind}_plan" for prefix in ("base_model_", "_") for kind in ("tp", "sp", "ep", "tp_ep", "sp_ep")]
_PATTERN = re.compile(r"[\w*]*_[\w*]*plan")
_ATTRIBUTE_HOOKS = ("__getattr__", "__getattribute__")
_CODE_FUNCTIONS = ("exec", "eval", "compile")


@dataclass(frozen=True)
class Accountant:
    """Finds what a file does to plans in ways that are not read.

    Args:
        source: the file.
        definitions: the definitions of the names in the file.
    """

    source: SourceFile
    definitions: Definitions
    _object_plans: dict[Function, frozenset[str]] = field(default_factory=dict)

    def find_unread_uses(self) -> Iterator[Unresolved | Conflict]:
        """Yield the uses that give plans entries in an unread way, and the conflicts of plans that escape."""
        for node in filter(_can_use_plan, (*self.definitions.statements, *self._parents)):
            yield from self._find_references(node)
            yield from self._find_other_names(node)
            yield from self._find_bindings(node)
            yield from self._find_computed_names(node)
            yield from self._find_hidden_code(node)
        yield from self._find_style_reads()

    @cached_property
    def _parents(self) -> Mapping[ast.AST, ast.AST]:
        return index_parents(self.definitions.statements)

    @cached_property
    def _finder(self) -> EscapeFinder:
        return EscapeFinder(self.definitions.statements, self._parents)

    def find_style_sources(self) -> Iterator[StyleSource]:
        """Yield what gives styles of plans, or plans, to other files that need not name a plan."""
        for name, carried in self._flow.list_exports().items() if self._flow else ():
            for is_plan, plans in ((True, carried.plans), (False, carried.styles)):
                yield from (StyleSource(name, *plan, is_plan=is_plan) for plan in sorted(plans))

    def _find_style_reads(self) -> Iterator[Conflict]:
        """Yield the code that tells the styles of plans apart by their names."""
        if self._flow:
            yield from StyleReader(self._flow, self.definitions, self._get_function_name).find_conflicts()

    @cached_property
    def _flow(self) -> StyleFlow | None:
        """The styles in the names of the file, None if it reads no plan."""
        nodes = (*self.definitions.statements, *self._parents)
        can_refer = (ast.Name, ast.Attribute, ast.Call, ast.Subscript)
        references: dict[ast.AST, Carried] = {
            node: Carried(plans)
            for node in nodes
            if isinstance(node, can_refer) and (plans := self._read_reference(node))
        }
        return StyleFlow(nodes, self._parents, lambda node: references.get(node)) if references else None

    def _read_reference(self, node: ast.AST) -> frozenset[tuple[str, str]]:
        """Return the plans that an expression may be whose styles can be read, plans that functions are given too."""
        match node:
            case ast.Name(id=name, ctx=ast.Load()) if plan_kind(name):
                scope = self._get_scope(node)
                if name in scope.object_plans or (scope.function and name not in scope.free_parameters):
                    return frozenset()
                is_given = name in scope.free_parameters or name in self.definitions.imported
                return frozenset([(ANY_CLASS if is_given else scope.class_name, name)])
            case ast.Attribute(value=owner, attr=name, ctx=ast.Load()) if plan_kind(name):
                return frozenset([(self._get_scope(node).resolve_owner(owner), name)])
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, key, *_]):
                return frozenset(self._resolve_computed(node, owner, key)[1])
            case ast.Subscript(value=owner, slice=key, ctx=ast.Load()) if _is_namespace(owner) or read_key(key):
                return frozenset(self._resolve_computed(node, owner, key)[1])
        return frozenset()

    def _find_references(self, node: ast.AST) -> Iterator[Unresolved | Conflict]:
        """Yield the escapes of the plans that an expression may be; they are several if its name is computed."""
        match node:
            case ast.Name(id=name, ctx=ast.Load()) if is_plan_attribute(name):
                scope = self._get_scope(node)
                is_given = name in scope.free_parameters | scope.object_plans or name in self.definitions.imported
                plans = [] if is_given else [(scope.class_name, name)]
            case ast.Attribute(value=owner, attr=name, ctx=ast.Load()) if is_plan_attribute(name):
                scope = self._get_scope(node)
                plans = [(scope.resolve_owner(owner), name)]
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, key, *_]):
                scope, plans = self._resolve_computed(node, owner, key)
            case ast.Subscript(value=owner, slice=key, ctx=ast.Load()) if _is_namespace(owner) or read_key(key):
                scope, plans = self._resolve_computed(node, owner, key)
            case _:
                return
        for class_name, attribute in plans:
            for escape in self._finder.find_escapes(node, attribute, is_known=scope.is_known_class(class_name)):
                yield self._report_escape(escape, class_name, attribute, scope)

    def _find_other_names(self, node: ast.AST) -> Iterator[Unresolved | Conflict]:
        """Yield the escapes of a plan through the other names of an assignment: `plan = base_model_tp_plan = {…}`."""
        for target, value in iter_bindings(node) if isinstance(node, (ast.Assign, ast.AnnAssign)) else ():
            if not is_plan_attribute(get_identifier(target)):
                continue
            scope = self._get_scope(node)
            others = [other for other, same in iter_bindings(node) if same is value and other is not target]
            others += [part.target for part in ast.walk(value) if isinstance(part, ast.NamedExpr)]
            for other in others if isinstance(target, ast.Attribute) or not scope.function else ():
                for escape in self._finder.find_alias_escapes(other, get_identifier(target)):
                    yield self._report_escape(escape, scope.resolve_class(target), get_identifier(target), scope)

    def _find_bindings(self, node: ast.AST) -> Iterator[Unresolved]:
        """Yield what gives a plan's name a value otherwise than by an assignment that is read."""
        match node:
            case ast.ClassDef(keywords=keywords):
                for keyword in keywords:
                    if keyword.arg and plan_kind(keyword.arg):
                        name = self._get_class_name(node, own=True)
                        reason = "from a keyword of the class, which its bases interpret"
                        yield self._report(node, name, keyword.arg, Scope(name), reason)
            case ast.Attribute(attr=name, ctx=ast.Store()) if is_plan_attribute(name):
                if not self._is_read_target(node):
                    scope = self._get_scope(node)
                    yield self._report(node, scope.resolve_class(node), name, scope)
        bound = _get_bound_name(node)
        if bound and is_plan_attribute(bound) and not self._is_read_target(node):
            scope = self._get_scope(node)
            if not scope.function:
                yield self._report(node, scope.class_name, bound, scope)

    def _is_read_target(self, node: ast.AST) -> bool:
        """Return whether a stored name is the target of a statement that is read."""
        parent = self._parents.get(node)
        while isinstance(parent, (ast.Tuple, ast.List, ast.Starred)):
            parent = self._parents.get(parent)
        match parent:
            case ast.Assign(targets=targets):
                parts = [part for target in targets for part in ast.walk(target)]
                is_exact = node in targets or not any(isinstance(part, ast.Starred) for part in parts)
                return is_exact and any(target is node for target, _ in iter_bindings(parent))
            case ast.AugAssign(op=operator):
                return isinstance(operator, ast.BitOr)
        return isinstance(parent, (ast.AnnAssign, ast.NamedExpr))

    def _find_computed_names(self, node: ast.AST) -> Iterator[Unresolved]:
        """Yield what assigns a plan under a name that is computed: `setattr(self, f"base_model_{kind}_plan", …)`."""
        match node:
            case ast.Call(func=ast.Name(id="setattr"), args=[owner, key, _]):
                scope, plans = self._resolve_computed(node, owner, key)
            case ast.Subscript(value=owner, slice=key, ctx=ast.Store()) if _is_namespace(owner):
                scope, plans = self._resolve_computed(node, owner, key)
            case _:
                return
        for class_name, attribute in plans:
            if attribute != read_key(key) or "*" in attribute:
                yield self._report(node, class_name, attribute, scope)

    def _find_hidden_code(self, node: ast.AST) -> Iterator[Unresolved]:
        """Yield code in strings that mentions plans, and functions that decide on the values of any attribute."""
        match node:
            case ast.Constant(value=str(name)) if is_plan_attribute(name):
                scope = self._get_scope(node)
                if scope.function in _ATTRIBUTE_HOOKS:
                    yield self._report(self._finder.find_function(node) or node, scope.class_name, name, scope)
            case ast.Call(func=ast.Name(id=function), args=[code, *_]) if function in _CODE_FUNCTIONS:
                scope = self._get_scope(node)
                strings = (part.value for part in ast.walk(code) if isinstance(part, ast.Constant))
                texts = [string.encode() for string in strings if isinstance(string, str)]
                mentions = [text[start:end].decode() for text in texts for start, end in find_plan_mentions(text)]
                for name in dict.fromkeys(filter(is_plan_attribute, mentions)):
                    yield self._report(node, scope.class_name or ANY_CLASS, name, scope)

    def _resolve_computed(self, node: ast.AST, owner: ast.expr, key: ast.expr) -> tuple[Scope, list[tuple[str, str]]]:
        """Return the scope of a node, and the plans that an attribute may be whose name is an expression."""
        names = self._read_plan_names(key)
        scope = self._get_scope(node) if names else Scope()
        return scope, [(scope.resolve_owner(owner), name) for name in names]

    def _read_plan_names(self, key: ast.expr) -> list[str]:
        """Return the names of plans that the name of an attribute may be, computed parts as wildcards."""
        names = {read_key(key)} if not isinstance(key, ast.Name) else set(self._iter_values(key.id))
        return sorted(name for name in names if name and _is_plan_pattern(name))

    def _iter_values(self, name: str, depth: int = 3) -> Iterator[str | None]:
        """Yield the strings that a name may stand for, through loops and other names."""
        for value in self.definitions.find_all_values(name) if depth else ():
            displays = value.elts if isinstance(value, (ast.Tuple, ast.List, ast.Set)) else [value]
            for part in displays:
                for one in part.elts if isinstance(part, (ast.Tuple, ast.List)) else [part]:
                    if isinstance(one, ast.Name):
                        yield from self._iter_values(one.id, depth - 1)
                    elif isinstance(one, ast.expr):
                        yield read_key(one)

    def _report_escape(self, escape: Escape, owner: str, attribute: str, scope: Scope) -> Unresolved | Conflict:
        """Return an escape: entries that cannot be read where the code changes the plan or mentions experts."""
        expression = escape.node
        while not isinstance(parent := self._parents[expression], ast.stmt):
            expression = parent
        is_expression = isinstance(expression, ast.expr)
        text = self.source.body[slice(*span(expression, self.source.offset))] if is_expression else b""
        if escape.is_write or b"experts" in text:
            return self._report(escape.node, owner, attribute, scope)
        line = getattr(escape.node, "lineno", 1)
        return Conflict(owner, attribute, None, line, "hands it to code that may change it", scope.function)

    def _report(
        self, node: ast.AST, owner: str, attribute: str, scope: Scope, reason: str = "that cannot be read"
    ) -> Unresolved:
        statement = node
        while not isinstance(statement, ast.stmt):
            statement = self._parents[statement]
        is_known = scope.is_known_class(owner)
        return Unresolved(
            owner if is_known else scope.class_name,
            attribute,
            getattr(node, "lineno", statement.lineno),
            mention_experts(statement, self.source, self.definitions),
            reason,
            scope.function,
            "" if is_known else owner,
        )

    def _get_scope(self, node: ast.AST) -> Scope:
        function = self._finder.find_function(node)
        return Scope(
            self._get_class_name(node),
            function.name if function else "",
            free_parameters=find_free_parameters(function) if function else frozenset(),
            object_plans=self._find_object_plans(function) if function else frozenset(),
            classes=self.definitions.classes,
            imported=self.definitions.imported,
        )

    def _get_function_name(self, node: ast.AST) -> str:
        function = self._finder.find_function(node)
        return function.name if function else ""

    def _find_object_plans(self, function: Function) -> frozenset[str]:
        if function not in self._object_plans:
            self._object_plans[function] = find_object_plans(function)
        return self._object_plans[function]

    def _get_class_name(self, node: ast.AST, *, own: bool = False) -> str:
        """Return the qualified name of the class around a node, empty outside of classes."""
        names: list[str] = []
        parent = node if own else self._parents.get(node)
        while parent is not None:
            if isinstance(parent, ast.ClassDef):
                names.append(parent.name)
            elif isinstance(parent, Function) and names:
                names.append(f"{parent.name}.<locals>")
            parent = self._parents.get(parent)
        return ".".join(reversed(names))


_USES = (ast.Call, ast.Subscript, ast.Assign, ast.AnnAssign, ast.ClassDef, ast.alias, ast.ExceptHandler)
_PATTERNS = (ast.MatchAs, ast.MatchStar, ast.MatchMapping)


def _can_use_plan(node: ast.AST) -> bool:
    """Return whether a node can be among the uses that are looked for; most of a file's nodes cannot."""
    match node:
        case (
            ast.Name(id=name)
            | ast.Attribute(attr=name)
            | ast.Constant(value=str(name))
            | ast.FunctionDef(name=name)
            | ast.AsyncFunctionDef(name=name)
        ):
            return is_plan_attribute(name)
    return isinstance(node, (*_USES, *_PATTERNS))


def _is_namespace(node: ast.expr) -> bool:
    """Return whether an expression is the namespace of an object: `vars(x)`, `x.__dict__`, `locals()`."""
    match node:
        case ast.Call(func=ast.Name(id="vars" | "locals" | "globals")) | ast.Attribute(attr="__dict__"):
            return True
    return False


def _is_plan_pattern(name: str) -> bool:
    return _PATTERN.fullmatch(name) is not None and any(fnmatchcase(plan, name) for plan in _PLANS)


def _get_bound_name(node: ast.AST) -> str | None:
    """Return the name that a node binds, None for names that are bound by a definition that is read."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.ClassDef(name=name):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return name if any(isinstance(part, (ast.Yield, ast.YieldFrom)) for part in ast.walk(node)) else None
        case ast.alias(name=name, asname=alias):
            return alias or name
        case ast.MatchAs(name=name) | ast.MatchStar(name=name) | ast.MatchMapping(rest=name):
            return name
        case ast.ExceptHandler(name=name):
            return name
    return None
