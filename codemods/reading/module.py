"""The plans of a source file as data: its classes, their plan literals, and what else changes their plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property

from codemods.reading.entries import PlanEntry
from plans.plan import to_wildcard

__all__ = [
    "ANY_KEY",
    "ClassPlans",
    "Condition",
    "Conflict",
    "Import",
    "Module",
    "Opaque",
    "PlanCopy",
    "PlanLiteral",
    "Reference",
    "Removal",
    "StyleReading",
    "StyleSource",
    "Unresolved",
    "are_exclusive",
    "iter_literals",
]

ANY_KEY = "*"
"""The key of a removal whose key is computed as a whole, which may remove any entry."""


@dataclass(frozen=True)
class Condition:
    """A condition under which a literal applies: an `if`, a `case`, or a conditional expression around it.

    Args:
        test: the normalized source text of the test; for a case, `subject == value` or `matches(subject, 'pattern')`.
        holds: whether the literal applies if the test is true; if not, it applies if the test is false.
    """

    test: str
    holds: bool


@dataclass(frozen=True)
class PlanLiteral:
    """The plan entries of one expression.

    Args:
        class_name: the qualified name of the enclosing class, empty outside of classes.
        attribute: the plan that the entries belong to, such as `base_model_tp_plan`; `tp_plan` for an argument of that
            name.
        line: the first line of the expression, counted from 1.
        entries: the entries, in the order of the text.
        function: the enclosing function, empty in a class body.
        conditions: the enclosing conditions in that function, outermost first.
        is_partial: whether the expression also contains entries that are written elsewhere, as in `{**BASE, …}`.
        replaces: whether it replaces the whole plan, as in `self.plan = {…}`, instead of adding to it.
    """

    class_name: str
    attribute: str
    line: int
    entries: tuple[PlanEntry, ...]
    function: str = ""
    conditions: tuple[Condition, ...] = ()
    is_partial: bool = False
    replaces: bool = False

    @cached_property
    def plan(self) -> Mapping[str, str]:
        """Key to style, without computed styles. If a key is given twice, the last one counts, as in Python."""
        return {entry.key: entry.style for entry in self.entries if entry.style is not None}

    def equals(self, other: PlanLiteral) -> bool:
        """Return whether two literals write the same entries into the same plan in the same function."""
        return self._comparison_key == other._comparison_key

    @property
    def _comparison_key(self) -> tuple[object, ...]:
        return self.attribute, self.function, tuple((entry.key, entry.style) for entry in self.entries)


@dataclass(frozen=True)
class Opaque:
    """An assignment of something without entries to a plan: `None`, `AttributeError()`, a call or a name."""

    class_name: str
    attribute: str
    line: int


@dataclass(frozen=True)
class Removal:
    """Code that removes entries from a plan: `del plan[key]`, `.pop(key)`, `.clear()`, `self.plan = None`.

    Args:
        attribute: the plan.
        key: the key that is removed, its computed parts as wildcards; `ANY_KEY` if all of it is computed; None if all
            entries are removed.
        line: the line of the statement, counted from 1.
        function: the enclosing function, empty in a class body.
        conditions: the enclosing conditions in that function, outermost first.
        class_name: the qualified name of the class that has the plan, empty if the code names no class.
    """

    attribute: str
    key: str | None
    line: int
    function: str = ""
    conditions: tuple[Condition, ...] = ()
    class_name: str = field(default="", compare=False)


@dataclass(frozen=True)
class Reference:
    """An expression without keys of its own whose entries become part of a plan: `BASE`, `Parent.plan`, `make(1)`.

    Args:
        class_name: the qualified name of the enclosing class, empty outside of classes.
        attribute: the plan.
        line: the first line of the expression, counted from 1.
        start: the offset of the expression in the text.
        text: the normalized source text of the expression.
        function: the enclosing function, empty in a class body.
        conditions: the enclosing conditions in that function, outermost first.
        replaces: whether it replaces the whole plan.
    """

    class_name: str
    attribute: str
    line: int
    start: int
    text: str
    function: str = ""
    conditions: tuple[Condition, ...] = ()
    replaces: bool = False


@dataclass(frozen=True)
class Unresolved:
    """Code that adds entries to a plan which cannot be read from the source.

    Args:
        class_name: the qualified name of the enclosing class, empty outside of classes.
        attribute: the plan.
        line: the line of the statement, counted from 1.
        mentions_experts: whether the code that the entries come from contains the word `experts`.
        reason: why the entries cannot be read, as a clause that follows `entries`.
        function: the enclosing function, empty in a class body.
        owner: the class that has the plan, if it is neither the enclosing class nor another one of the file: the dotted
            name of an imported class, or `ANY_CLASS`.
        is_assigned: whether the entries become the plan, instead of being added to it.
    """

    class_name: str
    attribute: str
    line: int
    mentions_experts: bool
    reason: str = "that cannot be read"
    function: str = ""
    owner: str = ""
    is_assigned: bool = False


@dataclass(frozen=True)
class StyleReading:
    """How code tells styles apart by their names.

    Args:
        outcomes: each name that it mentions with what follows from it; names with one outcome are not told apart.
        tests: methods of strings that it calls on a style, each with its argument.
        is_known: whether it is known which names it tells apart.
        needs_outcome: whether it fails for names that it does not mention.
        reaches_tree: whether it may read any plan of the tree, not only those of files near by.
    """

    outcomes: tuple[tuple[str, str], ...] = ()
    tests: tuple[tuple[str, str], ...] = ()
    is_known: bool = True
    needs_outcome: bool = False
    reaches_tree: bool = False

    def distinguishes(self, before: str | None, after: str) -> bool:
        """Return whether the code does something else when a style is renamed.

        Args:
            before: the name that the style has, None for a new entry.
            after: the name that it gets.
        """
        if not self.is_known:
            return True
        if before is None:
            return self.needs_outcome and after not in dict(self.outcomes)
        return self._get_outcome(before) != self._get_outcome(after)

    def _get_outcome(self, name: str) -> tuple[object, ...]:
        outcomes = {mentioned.casefold(): outcome for mentioned, outcome in reversed(self.outcomes)}
        return outcomes.get(name.casefold()), *(getattr(name, method)(part) for method, part in self.tests)


@dataclass(frozen=True)
class StyleSource:
    """A name by which other files get a plan or its styles: a function, a method, an attribute, a constant.

    Args:
        name: the name.
        class_name: the class that has the plan, as in `Conflict`.
        attribute: the plan.
        is_plan: whether it gives the plan itself; otherwise styles, or what they are made into.
    """

    name: str
    class_name: str
    attribute: str
    is_plan: bool


@dataclass(frozen=True)
class Conflict:
    """A reason why a plan must stay as it is: another statement shares or changes some of its entries.

    Args:
        class_name: the class that has the plan: the qualified name of one of the file, the dotted name of an imported
            one, or `ANY_CLASS`.
        attribute: the plan; a computed part of its name is a wildcard.
        module: the experts module that must stay as it is, None for all of them.
        line: the line of the other statement, counted from 1.
        reason: what the other statement does, as a clause without its subject, the line.
        function: the enclosing function, empty in a class body. Code of a function also concerns the plans that other
            classes inherit from the class, and those that it inherits itself.
        reading: how the statement tells styles apart, if that is all that it does; only renamed styles concern it.
    """

    class_name: str
    attribute: str
    module: str | None
    line: int
    reason: str
    function: str = ""
    reading: StyleReading | None = None

    def concerns(self, attribute: str, module: str) -> bool:
        """Return whether an experts module must stay as it is in a plan.

        Args:
            attribute: the plan.
            module: the key of the experts module; layer numbers count as wildcards.
        """
        is_same_module = self.module is None or to_wildcard(self.module) == module
        return is_same_module and fnmatchcase(attribute, self.attribute)


@dataclass(frozen=True)
class PlanCopy:
    """An expression that copies another plan into a plan: what changes the copy must hold both.

    Args:
        class_name: the class that has the plan, as in `Conflict`.
        attribute: the plan.
        source_class: the class that has the copied plan, as in `Conflict`.
        source_attribute: the copied plan.
        line: the line of the copied plan's name, counted from 1.
        function: the enclosing function, empty in a class body.
    """

    class_name: str
    attribute: str
    source_class: str
    source_attribute: str
    line: int
    function: str = ""


@dataclass(frozen=True)
class ClassPlans:
    """A class with its own plans, without those that it inherits.

    Args:
        name: the qualified name, `Outer.Inner`; empty for code outside of classes.
        bases: the dotted names of its base classes as written, without bases that are computed.
        plans: the name of each plan attribute with the last value that the class body assigns to it.
        code_literals: the literals in its functions and under conditions, in order.
        removals: the entries that its functions remove from plans, in order.
        conflicts: the reasons why its plans must stay as they are.
        references: the expressions without keys of their own whose entries its plans contain, in order.
    """

    name: str
    bases: tuple[str, ...] = ()
    plans: Mapping[str, PlanLiteral | Opaque] = field(default_factory=dict)
    code_literals: tuple[PlanLiteral, ...] = ()
    removals: tuple[Removal, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    references: tuple[Reference, ...] = ()


@dataclass(frozen=True)
class Import:
    """The object that an import binds a name to.

    Args:
        level: the number of leading dots, 0 for an absolute import.
        module: the module after the dots, empty in `from . import name`.
        name: the name in that module; empty for the module itself, `*` for all names.
    """

    level: int
    module: str
    name: str


@dataclass(frozen=True)
class Module:
    """The plans of one file.

    Args:
        classes: the classes by name.
        read_imports: returns `imports`; called only if they are needed.
        unresolved: the uses that add entries to plans which cannot be read, in order.
        outward_conflicts: the reasons that its code gives why plans of classes of other files must stay as they are.
        copies: the plans that become parts of other plans.
        style_sources: what gives plans and their styles to other files.
        plan_classes: the names of the classes that write plans; None if each class must be examined.
    """

    classes: Mapping[str, ClassPlans]
    read_imports: Callable[[], Mapping[str, Import]] = field(repr=False, compare=False)
    unresolved: tuple[Unresolved, ...] = ()
    outward_conflicts: tuple[Conflict, ...] = ()
    copies: tuple[PlanCopy, ...] = ()
    style_sources: tuple[StyleSource, ...] = ()
    plan_classes: tuple[str, ...] | None = field(default=None, compare=False)

    @property
    def writers(self) -> Iterator[ClassPlans]:
        """The classes that may write plans."""
        return (self.classes[name] for name in (self.classes if self.plan_classes is None else self.plan_classes))

    @cached_property
    def imports(self) -> Mapping[str, Import]:
        """The names that are bound by imports and may lead to another model.

        Raises:
            SourceError: the imports have an unusual form, and the file cannot be parsed.
        """
        return self.read_imports()


def iter_literals(module: Module) -> Iterator[PlanLiteral]:
    """Yield every plan literal of a file, class by class."""
    for owner in module.classes.values():
        yield from (plan for plan in owner.plans.values() if isinstance(plan, PlanLiteral))
        yield from owner.code_literals


def are_exclusive(one: PlanLiteral | Removal, other: PlanLiteral | Removal) -> bool:
    """Return whether two uses of a plan can never both apply: they are in one function, under opposite conditions."""
    if one.function != other.function:
        return False
    return any(replace(condition, holds=not condition.holds) in other.conditions for condition in one.conditions)
