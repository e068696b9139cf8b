"""What a source file says of plans: its classes, what they assign, and the entries written down in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from codemods.entries import Entry
from plans.plan import plan_kind

__all__ = [
    "ClassPlans",
    "Condition",
    "Module",
    "Opaque",
    "PlanLiteral",
    "all_literals",
    "is_plan_attribute",
    "plan_words",
]

_PLAN_NAME = re.compile(rb"(?:(?:base_model)?_)?(?:tp|sp|ep|tp_ep|sp_ep)_plan")
_PLAN_ENDING = re.compile(rb"_plan\b")
_WORD = re.compile(rb"\w+\Z")
_LONGEST = len("base_model_tp_ep") + 1


@dataclass(frozen=True)
class Condition:
    """An `if` around a literal.

    Args:
        test: its source text, normalized.
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
        conditions: the `if` statements around it in that function, outermost first.
        takes_in: whether it also takes in entries that are written elsewhere, `{**BASE, …}`.
    """

    class_name: str
    attribute: str
    line: int
    entries: tuple[Entry, ...]
    function: str = ""
    conditions: tuple[Condition, ...] = ()
    takes_in: bool = False

    @cached_property
    def plan(self) -> Mapping[str, str]:
        """Key to style; of a key given twice the last counts, as in Python. Computed styles are left out."""
        return {entry.key: entry.style for entry in self.entries if entry.style is not None}

    def says_the_same_as(self, other: PlanLiteral) -> bool:
        """Say whether both put the same entries into the same plan in the same function."""
        return self._saying == other._saying

    @property
    def _saying(self) -> tuple[object, ...]:
        return self.attribute, self.function, tuple((entry.key, entry.style) for entry in self.entries)


@dataclass(frozen=True)
class Opaque:
    """A plan attribute of a class assigned anything but entries: `None`, `AttributeError()`, a call, a name."""

    class_name: str
    attribute: str
    line: int


@dataclass(frozen=True)
class ClassPlans:
    """A class with the plans that it writes down itself.

    Args:
        name: qualified, `Outer.Inner`; empty for what stands outside of classes.
        bases: its base classes as written, dotted; a base that is computed is left out.
        plans: attribute name to what the class body last assigns to it.
        code: the literals in its functions, in order.
    """

    name: str
    bases: tuple[str, ...] = ()
    plans: Mapping[str, PlanLiteral | Opaque] = field(default_factory=dict)
    code: tuple[PlanLiteral, ...] = ()


@dataclass(frozen=True)
class Module:
    """What a file says of plans.

    Args:
        classes: by name.
        imports: names brought in by `from` imports, each with the level (0 where absolute) and the module.
    """

    classes: Mapping[str, ClassPlans]
    imports: Mapping[str, tuple[int, str]]


def plan_words(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where a source mentions a plan by name: start and end of each word.

    The rare end of the word is looked for first, which is several times faster than looking for whole words.
    """
    for ending in _PLAN_ENDING.finditer(body):
        beginning = _WORD.search(body, max(0, ending.start() - _LONGEST), ending.start())
        start = beginning.start() if beginning else ending.start()
        if _PLAN_NAME.fullmatch(body, start, ending.end()):
            yield start, ending.end()


def all_literals(module: Module) -> Iterator[PlanLiteral]:
    """Yield every literal of a file, class by class."""
    for owner in module.classes.values():
        yield from (plan for plan in owner.plans.values() if isinstance(plan, PlanLiteral))
        yield from owner.code


def is_plan_attribute(name: str) -> bool:
    """Say whether a class attribute of this name holds a plan."""
    return name.startswith(("_", "base_model_")) and plan_kind(name) is not None
