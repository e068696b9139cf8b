"""Prints how the code is built: circles of imports, the way of a value through the files, names, sizes, README.

    python benchmarks/structure.py [CHECKOUT]

Nothing is imported or run: all figures come from the syntax trees of the four packages. A value is followed as a reader
would follow it: from one parameter of one function, in the order of the text, into every function of the project that
is called with it or with what was made of it, up to 400 calls. Given another checkout, such as an earlier revision in
a git worktree, both are measured and the figures stand side by side.
"""

from __future__ import annotations

import ast
import statistics
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGES = ("migrator", "codemods", "runtime", "plans")
LONG = 400
CALLS = 400

# What is followed: a title, and where it begins, in today's files and in those of earlier revisions.
JOURNEYS = {
    "a plan literal, from plan_rewrites": [("codemods.rewriting.migrate", "plan_rewrites", "paths")],
    "a checkpoint, from plan_reshard": [
        ("runtime.checkpoint.resharding.plan", "plan_reshard", "source"),
        ("runtime.checkpoint.reshard", "plan_reshard", "source"),
    ],
    "a plan, from parallelize": [("runtime.parallel.parallelize", "parallelize", "plan")],
}

# Irregular participles that are no imperative as well, such as `read`, `cut`, `split` and `set` are.
# fmt: off
IRREGULAR = frozenset(
    {
        "begun", "beaten", "bent", "bitten", "borne", "born", "bought", "bound", "broken", "brought", "built",
        "caught", "chosen", "dealt", "done", "drawn", "driven", "eaten", "fallen", "fed", "felt", "forgotten",
        "fought", "found", "frozen", "given", "gone", "grown", "heard", "held", "hidden", "kept", "known",
        "laid", "led", "left", "lent", "lost", "made", "meant", "met", "paid", "risen", "said", "seen", "sent",
        "shaken", "shown", "sold", "sought", "spent", "spoken", "stolen", "stood", "stuck", "sung", "sunk",
        "sworn", "taken", "taught", "told", "thought", "thrown", "torn", "understood", "withheld", "won",
        "worn", "wound", "woven", "written",
    }
)
# fmt: on
NO_PARTICIPLES = frozenset({"bed", "embed", "exceed", "feed", "need", "proceed", "seed", "shed", "speed", "succeed"})

# A method of this name is taken for that of text, a container or a path, not for one of the project's.
BUILT_IN = frozenset(name for kind in (str, bytes, dict, list, set, tuple, Path) for name in dir(kind))

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imported(self) -> dict[str, tuple[str, str]]:
        """What imports anywhere in the file bind: local name to a module and the name in it, `""` for all of it."""
        names: dict[str, tuple[str, str]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        return names

    @cached_property
    def header_lines(self) -> int:
        """Lines of the module's docstring, its imports and `__all__`."""
        body = self.tree.body
        head = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom)) or is_header(node)]
        head += [body[0]] if ast.get_docstring(self.tree) else []
        return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in set(head))


def is_header(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.Assign) and any(
        isinstance(one, ast.Name) and one.id == "__all__" for one in node.targets
    )


@dataclass
class Code:
    """All modules of a checkout by name, packages' own files left out."""

    root: Path
    modules: dict[str, Module] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> Code:
        code = cls(root)
        for package in PACKAGES:
            for path in sorted((root / package).rglob("*.py")):
                name = ".".join(path.relative_to(root).with_suffix("").parts)
                if path.name != "__init__.py":
                    code.modules[name] = Module(name, path, path.read_text("utf-8"))
        return code

    @cached_property
    def arrows(self) -> dict[str, set[str]]:
        """Which modules each one imports, for types alone and inside functions too."""
        return {
            module.name: {found for target in module.imported.values() if (found := self._find(*target))}
            - {module.name}
            for module in self.modules.values()
        }

    def _find(self, module: str, name: str) -> str | None:
        return next((found for found in (f"{module}.{name}", module) if found in self.modules), None)

    @cached_property
    def methods(self) -> dict[str, list[tuple[Module, ast.ClassDef, Function]]]:
        """The methods of all classes by name."""
        found: dict[str, list[tuple[Module, ast.ClassDef, Function]]] = {}
        for module in self.modules.values():
            for owner in module.tree.body:
                if isinstance(owner, ast.ClassDef):
                    for method in owner.body:
                        if isinstance(method, Function):
                            found.setdefault(method.name, []).append((module, owner, method))
        return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other in a loop: strongly connected components of several."""
    order: list[str] = []
    seen: set[str] = set()

    def finish(start: str, edges: dict[str, set[str]], out: list[str]) -> None:
        waiting: list[tuple[str, Iterator[str]]] = [(start, iter(sorted(edges[start])))]
        seen.add(start)
        while waiting:
            node, rest = waiting[-1]
            following = next((other for other in rest if other not in seen), None)
            if following is None:
                out.append(node)
                waiting.pop()
            else:
                seen.add(following)
                waiting.append((following, iter(sorted(edges[following]))))

    for node in sorted(arrows):
        if node not in seen:
            finish(node, arrows, order)
    importers: dict[str, set[str]] = {node: set() for node in arrows}
    for node, others in arrows.items():
        for other in others:
            importers[other].add(node)
    seen.clear()
    groups: list[list[str]] = []
    for node in reversed(order):
        if node not in seen:
            groups.append([])
            finish(node, importers, groups[-1])
    return [sorted(group) for group in groups if len(group) > 1]


class Journey:
    """The way of one parameter through the project's functions."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.calls = 0
        self.files: dict[str, None] = {}
        self._entered: set[tuple[str, int, frozenset[str]]] = set()

    def enter(self, module: Module, function: Function, parameters: frozenset[str], owner: ast.ClassDef | None) -> None:
        """Follow parameters that hold the value through a function's body."""
        key = (module.name, function.lineno, parameters)
        if self.calls >= CALLS or key in self._entered:
            return
        self._entered.add(key)
        self.calls += 1
        self.files[module.name] = None
        carrying = set(parameters)
        for statement in function.body:
            self._follow(statement, carrying, module, owner)

    def _follow(self, node: ast.AST, carrying: set[str], module: Module, owner: ast.ClassDef | None) -> None:
        for child in ast.iter_child_nodes(node):
            self._follow(child, carrying, module, owner)
        match node:
            case ast.Assign(targets=targets, value=value):
                self._bind(targets, value, carrying)
            case ast.AnnAssign(target=target, value=ast.expr() as value) | ast.NamedExpr(target=target, value=value):
                self._bind([target], value, carrying)
            case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                self._bind([target], value, carrying)
            case ast.withitem(optional_vars=ast.expr() as target, context_expr=value):
                self._bind([target], value, carrying)
            case ast.Call():
                self._call(node, carrying, module, owner)

    def _bind(self, targets: Iterable[ast.expr], value: ast.expr, carrying: set[str]) -> None:
        if mentions(value, carrying):
            carrying |= {
                part.id
                for target in targets
                for part in ast.walk(target)
                if isinstance(part, ast.Name) and part.id != "_"
            }

    def _call(self, call: ast.Call, carrying: set[str], module: Module, owner: ast.ClassDef | None) -> None:
        given = [index for index, argument in enumerate(call.args) if mentions(argument, carrying)]
        named = {keyword.arg for keyword in call.keywords if keyword.arg and mentions(keyword.value, carrying)}
        receiver = isinstance(call.func, ast.Attribute) and mentions(call.func.value, carrying)
        if not (given or named or receiver):
            return
        for target, function, holder in self._targets(call.func, module, owner):
            names = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
            is_method = holder is not None and bool(names) and names[0] in ("self", "cls")
            own = names[1:] if is_method else names
            keywords = {one.arg for one in function.args.kwonlyargs} | set(own)
            parameters = {own[index] for index in given if index < len(own)} | {one for one in named if one in keywords}
            if receiver and is_method:
                parameters.add(names[0])
            if parameters:
                self.enter(target, function, frozenset(parameters), holder)

    def _targets(
        self, callee: ast.expr, module: Module, owner: ast.ClassDef | None
    ) -> Iterator[tuple[Module, Function, ast.ClassDef | None]]:
        """Yield the project's functions that a call may reach, as far as names alone tell."""
        match callee:
            case ast.Name(id=name):
                yield from self._named(module, name)
            case ast.Attribute(value=ast.Name(id=base), attr=name) if base in module.imported:
                where, what = module.imported[base]
                found = self.code.modules.get(f"{where}.{what}" if what else where)
                if found:
                    yield from self._named(found, name)
                elif what and where in self.code.modules:
                    yield from ((one, function, kind) for one, kind, function in self._method(where, what, name))
            case ast.Attribute(attr=name) if name not in BUILT_IN:
                found_methods = self.code.methods.get(name, [])
                own = [row for row in found_methods if row[0] is module and row[1] is owner]
                rows = own or (found_methods if len(found_methods) == 1 else [])
                yield from ((one, function, kind) for one, kind, function in rows)

    def _method(self, where: str, kind: str, name: str) -> Iterator[tuple[Module, ast.ClassDef, Function]]:
        return (row for row in self.code.methods.get(name, []) if (row[0].name, row[1].name) == (where, kind))

    def _named(self, module: Module, name: str) -> Iterator[tuple[Module, Function, ast.ClassDef | None]]:
        for node in module.tree.body:
            if isinstance(node, Function) and node.name == name:
                yield module, node, None
                return
        where, what = module.imported.get(name, ("", ""))
        if what and where in self.code.modules and (where, what) != (module.name, name):
            yield from self._named(self.code.modules[where], what)


def mentions(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def follow(code: Code, starts: Iterable[tuple[str, str, str]]) -> Journey:
    """Follow the first start that the checkout has."""
    journey = Journey(code)
    for where, name, parameter in starts:
        for node in code.modules[where].tree.body if where in code.modules else ():
            if isinstance(node, Function) and node.name == name:
                journey.enter(code.modules[where], node, frozenset({parameter}), None)
                return journey
    raise SystemExit(f"none of {list(starts)} is in {code.root}")


def participles(code: Code) -> tuple[list[str], int]:
    """Return the functions named by a past participle, and the number of all."""
    named: list[str] = []
    count = 0
    for module in code.modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, Function):
                count += 1
                first = node.name.strip("_").partition("_")[0]
                if first in IRREGULAR or (first.endswith("ed") and first not in NO_PARTICIPLES):
                    named.append(f"{module.name}.{node.name}")
    return named, count


def exceptions(root: Path) -> int:
    """Return the number of imports that the contracts ignore."""
    tables = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    return sum(len(table.get("ignore_imports", ())) for table in tables)


def figures(root: Path) -> dict[str, str]:
    """Return every figure of a checkout, by its title."""
    code = Code.read(root)
    loops = circles(code.arrows)
    lines = {module.name: len(module.text.splitlines()) for module in code.modules.values()}
    named, functions = participles(code)
    headers = sum(module.header_lines for module in code.modules.values())
    readme = (root / "README.md").read_text("utf-8")
    result = {
        "circles of imports": str(len(loops)),
        "ignore_imports": str(exceptions(root)),
        "modules without __init__.py": f"{len(lines):,}",
        "source lines": f"{sum(lines.values()):,}",
        "median lines of a module": f"{statistics.median(lines.values()):.0f}",
        "headers, share of all lines": f"{headers / sum(lines.values()):.1%}",
        "functions named by a participle": f"{len(named) / functions:.1%} of {functions:,}",
        "README, words and lines": f"{len(readme.split()):,}; {len(readme.splitlines()):,}",
    }
    for title, starts in JOURNEYS.items():
        journey = follow(code, starts)
        result[f"files: {title}"] = f"{len(journey.files)} in {journey.calls} calls"
    result["modules over 400 lines"] = (
        ", ".join(f"{name} {size}" for name, size in lines.items() if size > LONG) or "none"
    )
    result["circles"] = "; ".join(" ".join(group) for group in loops) or "none"
    result["named by a participle"] = ", ".join(named) if len(named) < 60 else f"{len(named)}"
    return result


def main() -> None:
    own = Path(__file__).resolve().parents[1]
    roots = [*map(Path, sys.argv[1:]), own]
    columns = [figures(root) for root in roots]
    width = max(map(len, columns[0]))
    for title in columns[0]:
        print(f"{title:<{width}}  " + "  ->  ".join(column[title] for column in columns))


if __name__ == "__main__":
    main()
