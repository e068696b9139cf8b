"""What a source file says of plans: its classes, what they assign, and the entries written down in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from codemods.reading.entries import PlanEntry

__all__ = [
    "ANY_KEY",
    "ClassPlans",
    "Condition",
    "Conflict",
    "Import",
    "Module",
    "Opaque",
    "PlanLiteral",
    "Reference",
    "Removal",
    "Unresolved",
    "are_exclusive",
    "iter_literals",
]

ANY_KEY = "*"
"""The key of a removal where code computes all of it: any entry may be meant."""


@dataclass(frozen=True)
class Condition:
    """What decides whether a literal applies: an `if`, a `case`, or a conditional expression around it.

    Args:
        test: its source text, normalized; of a case `subject == value`, or `matches(subject, 'pattern')`.
        holds: whether the literal stands where the test is true.
    """

    test: str
    holds: bool


@dataclass(frozen=True)
class PlanLiteral:
    """The plan entries that one expression writes down.

    Args:
        class_name: the qualified name of the class it stands in, empty outside of classes.
        attribute: the plan it goes into, `base_model_tp_plan`; `tp_plan` for an argument of that name.
        line: where it begins, counted from 1.
        entries: in order.
        function: the function it stands in, empty in a class body.
        conditions: those around it in that function, outermost first.
        is_partial: whether it also takes in entries that are written elsewhere, `{**BASE, …}`.
        replaces: whether it takes the place of all that the plan held, as in `self.plan = {…}`, and adds nothing.
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
        """Key to style; of a key given twice the last counts, as in Python. Computed styles are left out."""
        return {entry.key: entry.style for entry in self.entries if entry.style is not None}

    def equals(self, other: PlanLiteral) -> bool:
        """Return whether both put the same entries into the same plan in the same function."""
        return self._comparison_key == other._comparison_key

    @property
    def _comparison_key(self) -> tuple[object, ...]:
        return self.attribute, self.function, tuple((entry.key, entry.style) for entry in self.entries)


@dataclass(frozen=True)
class Opaque:
    """A plan attribute of a class assigned anything but entries: `None`, `AttributeError()`, a call, a name."""

    class_name: str
    attribute: str
    line: int


@dataclass(frozen=True)
class Removal:
    """Entries that code takes out of a plan: `del plan[key]`, `.pop(key)`, `.clear()`, `self.plan = None`.

    Args:
        attribute: the plan.
        key: the entry, its computed parts as wildcards, `ANY_KEY` where nothing of it is known; None for every entry.
        line: counted from 1.
        function: the function it stands in, empty in a class body.
        conditions: those around it in that function, outermost first.
        class_name: the qualified name of the class whose plan it is, empty where no class is named.
    """

    attribute: str
    key: str | None
    line: int
    function: str = ""
    conditions: tuple[Condition, ...] = ()
    class_name: str = field(default="", compare=False)


@dataclass(frozen=True)
class Reference:
    """What a plan takes over from an expression that writes no keys of its own: `BASE`, `Parent.plan`, `make(1)`.

    Args:
        class_name: the qualified name of the class it stands in, empty outside of classes.
        attribute: the plan.
        line: counted from 1.
        start: where it begins in the text.
        text: the expression, normalized.
        function: the function it stands in, empty in a class body.
        conditions: those around it in that function, outermost first.
        replaces: whether it takes the place of all that the plan held.
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
    """A use of a plan that puts entries into it which nobody here can read.

    Args:
        class_name: the qualified name of the class it stands in, empty outside of classes.
        attribute: the plan.
        line: counted from 1.
        mentions_experts: whether text beside it speaks of experts.
        reason: what keeps it from being read, to follow `entries here`.
    """

    class_name: str
    attribute: str
    line: int
    mentions_experts: bool
    reason: str = "that cannot be read"


@dataclass(frozen=True)
class Conflict:
    """What keeps a plan as it is: another statement of its file that shares its entries or changes some of them.

    Args:
        class_name: the qualified name of the class whose plan it is.
        attribute: the plan.
        module: the experts module that stays as it is, None for every one.
        reason: what the other statement does, with its line.
    """

    class_name: str
    attribute: str
    module: str | None
    reason: str


@dataclass(frozen=True)
class ClassPlans:
    """A class with the plans that it writes down itself.

    Args:
        name: qualified, `Outer.Inner`; empty for what stands outside of classes.
        bases: its base classes as written, dotted; a base that is computed is left out.
        plans: attribute name to what the class body last assigns to it.
        code_literals: the literals in its functions, and those that depend on conditions, in order.
        removals: what its functions take out of plans again, in order.
        conflicts: what else keeps its plans as they are.
        references: what its plans take over from expressions that write no keys of their own, in order.
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
    """What an import gives a name to.

    Args:
        level: the number of leading dots, 0 where absolute.
        module: what follows them, empty in `from . import name`.
        name: what is taken from there, as it is called there; empty for the module itself, `*` for all.
    """

    level: int
    module: str
    name: str


@dataclass(frozen=True)
class Module:
    """What a file says of plans.

    Args:
        classes: by name.
        read_imports: reads `imports` when they are asked for.
        unresolved: uses of plans that put entries into them which cannot be read, in order.
        plan_classes: the classes that write plans, where that is known without looking at each.
    """

    classes: Mapping[str, ClassPlans]
    read_imports: Callable[[], Mapping[str, Import]] = field(repr=False, compare=False)
    unresolved: tuple[Unresolved, ...] = ()
    plan_classes: tuple[str, ...] | None = field(default=None, compare=False)

    @property
    def writers(self) -> Iterator[ClassPlans]:
        """The classes that may write plans."""
        return (self.classes[name] for name in (self.classes if self.plan_classes is None else self.plan_classes))

    @cached_property
    def imports(self) -> Mapping[str, Import]:
        """The names that imports bring in which may lead to another model, each with what it stands for.

        Raises:
            SourceError: they are unusual, and the file does not parse.
        """
        return self.read_imports()


def iter_literals(module: Module) -> Iterator[PlanLiteral]:
    """Yield every literal of a file, class by class."""
    for owner in module.classes.values():
        yield from (plan for plan in owner.plans.values() if isinstance(plan, PlanLiteral))
        yield from owner.code_literals


def are_exclusive(one: PlanLiteral | Removal, other: PlanLiteral | Removal) -> bool:
    """Return whether two can never both apply: some condition in their one function holds for one, not for the other."""
    if one.function != other.function:
        return False
    return any(replace(condition, holds=not condition.holds) in other.conditions for condition in one.conditions)
