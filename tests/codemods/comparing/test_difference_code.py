"""Two revisions compared where code makes the plans: constants, helpers, conditions, and what cannot be read."""

from __future__ import annotations

import pytest

from codemods.inheritance.effective import UNRESOLVED
from tests.codemods.helpers import write_tree
from tests.codemods.repositories import ADDED, MIXTRAL, PACKAGE, Q_PROJ, commit, differences, edit, summarize

KID = f"{PACKAGE}/models/kid/configuration_kid.py"
PLANS = f"{PACKAGE}/models/plans.py"
NORM = 'BASE = {"norm": "colwise"}\n'


def kid(root, text, **others):
    """Commit a configuration, with more files beside it, to be edited then."""
    write_tree(root, {KID: text, **{f"{PACKAGE}/models/{name}.py": other for name, other in others.items()}})
    commit(root, "kid")


def test_a_constant_of_two_classes(root):
    kid(root, f"{NORM}class A:\n    base_model_tp_plan = BASE\nclass B:\n    base_model_tp_plan = BASE\n")
    edit(root, KID, "colwise", "rowwise")
    found = differences(root)
    assert [(one.variant.class_name, *summarize([one])[0]) for one in found] == [
        ("A", "kid", "norm", "placement", True),
        ("B", "kid", "norm", "placement", True),
    ]


@pytest.mark.parametrize(
    "imports", ["from ..plans import BASE", "from .. import plans", "from ..plans import OTHER as BASE"]
)
def test_an_imported_constant_is_not_explained(root, imports):
    name = "plans.BASE" if imports.endswith("plans") else "BASE"
    kid(root, f"{imports}\nclass A:\n    base_model_tp_plan = {{**{name}}}\n", plans=f"{NORM}OTHER = BASE\n")
    edit(root, PLANS, "colwise", "rowwise")
    assert summarize(differences(root)) == [("kid", "norm", "placement", False)]


def test_a_constant_that_one_helper_passes_on(root):
    text = "from ..plans import BASE\nclass A:\n    base_model_tp_plan = BASE\n"
    kid(root, text, plans="from .more import BASE\n", more=NORM)
    edit(root, f"{PACKAGE}/models/more.py", "colwise", "rowwise")
    assert summarize(differences(root)) == [("kid", "norm", "placement", False)]


def test_another_class_s_plan_taken_over_without_inheriting(root):
    text = (
        "from ..mixtral.configuration_mixtral import MixtralConfig\n"
        "class KidConfig:\n    base_model_tp_plan = {**MixtralConfig.base_model_tp_plan}\n"
    )
    kid(root, text)
    edit(root, MIXTRAL, f'"{Q_PROJ}": "colwise"', f'"{Q_PROJ}": "rowwise"')
    assert ("kid", Q_PROJ, "placement", False) in summarize(differences(root))


UNREADABLE = {
    "call": ("class A:\n    base_model_tp_plan = make(1)\n", "make(1)", "make(2)"),
    "function behind": (
        'def make(n):\n    return {f"layers.{n}": "colwise"}\nclass A:\n    base_model_tp_plan = make(1)\n',
        "colwise",
        "rowwise",
    ),
    "filter": (
        "class A:\n    def f(self):\n"
        "        self.base_model_tp_plan = {k: v for k, v in self.base_model_tp_plan.items() if 'down' not in k}\n",
        "down",
        "up",
    ),
    "computed key": (
        "class A:\n    def f(self, key):\n        self.base_model_tp_plan[key] = 'colwise'\n",
        "colwise",
        "rowwise",
    ),
    "handed on": (
        "class A:\n    def f(self):\n        helper(self.base_model_tp_plan, {'mlp.experts': 'colwise'})\n",
        "colwise",
        "rowwise",
    ),
    "constant that changes": (f"{NORM}BASE.pop('x')\nclass A:\n    base_model_tp_plan = BASE\n", "colwise", "rowwise"),
}


@pytest.mark.parametrize(("text", "before", "after"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_may_have_changed(root, text, before, after):
    kid(root, text)
    (root / KID).write_text((root / KID).read_text() + "\n# no more than a comment\n")
    assert differences(root) == ()
    edit(root, KID, before, after)
    assert summarize(differences(root)) == [("kid", UNRESOLVED, "unread", False)]


def test_what_a_helper_in_another_file_makes_may_have_changed(root):
    text = "from ..plans import make\nclass A:\n    base_model_tp_plan = make(1)\n"
    kid(root, text, plans='def make(n):\n    return {f"layers.{n}": "colwise"}\n')
    edit(root, PLANS, "colwise", "rowwise")
    assert summarize(differences(root)) == [("kid", UNRESOLVED, "unread", False)]


def test_a_computed_style_may_have_changed(root):
    kid(root, 'class A:\n    base_model_tp_plan = {"norm": pick(1), "other": pick(3)}\n')
    edit(root, KID, "pick(1)", "pick(2)")
    assert summarize(differences(root)) == [("kid", "norm", "unread", False)]


def test_a_plan_that_cannot_be_read_any_more_has_lost_nothing_for_sure(root):
    kid(root, 'class A:\n    base_model_tp_plan = {"norm": "colwise"}\n')
    edit(root, KID, '{"norm": "colwise"}', "make()")
    assert summarize(differences(root)) == [("kid", UNRESOLVED, "unread", False)]


UPDATE = '        self.base_model_tp_plan["norm"] = "rowwise"\n'
GUARDS = {
    "function": (f"class A:\n    def a(self):\n{UPDATE}", "def a(", "def b("),
    "if": (f"class A:\n    def a(self, x):\n        if x > 1:\n    {UPDATE}", "x > 1", "x > 2"),
    "arm": ('class A:\n    base_model_tp_plan = {\n        "norm": "rowwise"\n    } if X else None\n', "if X", "if Y"),
    "case": (
        f"class A:\n    def a(self, x):\n        match x:\n            case 1:\n        {UPDATE}",
        "case 1",
        "case 2",
    ),
}


@pytest.mark.parametrize(("text", "before", "after"), GUARDS.values(), ids=GUARDS)
def test_another_function_or_condition_is_one_change_that_its_own_line_explains(root, text, before, after):
    kid(root, text)
    edit(root, KID, before, after)
    (found,) = differences(root)
    assert summarize([found]) == [("kid", "norm", "condition", True)]
    assert found.moved_from is not None
    assert found.moved_from.plan != found.variant.plan


def test_another_condition_that_a_class_inherits_is_not_explained(root):
    line = f'if self.x > 1:\n            self.base_model_tp_plan["{Q_PROJ}"] = "rowwise"'
    edit(root, MIXTRAL, '__all__ = ["MixtralConfig"]', ADDED.format(line) + '\n\n__all__ = ["MixtralConfig"]')
    commit(root, "condition")
    edit(root, MIXTRAL, "self.x > 1", "self.x > 2")
    assert summarize(differences(root)) == [
        ("mixtral", Q_PROJ, "condition", True),
        ("offspring", Q_PROJ, "condition", False),
    ]


def test_another_style_under_another_condition_is_two_changes(root):
    kid(root, GUARDS["if"][0])
    edit(root, KID, "x > 1", "x > 2")
    edit(root, KID, "rowwise", "colwise")
    assert summarize(differences(root)) == [("kid", "norm", "removed", True), ("kid", "norm", "added", True)]
