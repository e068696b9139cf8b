"""Effective plans against Python's own inheritance, on real classes."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path

import pytest

from codemods.comparing.affected import ImportIndex, find_dependents
from codemods.files.sources import SourceFile
from codemods.inheritance.effective import EVERY_KEY, REMOVED, UNRESOLVED, EffectivePlans, PlanVariant, file_kind
from plans.errors import SourceError

PARENT = """
class Parent:
    base_model_tp_plan = {"a": "colwise", "b": "rowwise"}
    base_model_ep_plan = {"e": "grouped_gemm"}
"""
A, B, C, D = (Path(f"src/transformers/models/{name}/configuration_{name}.py") for name in "abcd")


def sources(files):
    table = {path: SourceFile(path, textwrap.dedent(text).encode()) for path, text in files.items()}
    return table.get


def plan_of(files, path, class_name, plan="base_model_tp_plan"):
    found = EffectivePlans(sources(files)).compute_file_plans(path)
    entries = found.get(PlanVariant(path, class_name, plan))
    return None if entries is None else {key: entry.style for key, entry in entries.items()}


def test_plans_are_inherited_across_files_with_the_place_they_are_written_at():
    files = {
        A: PARENT,
        B: "from ..a.configuration_a import Parent\nclass Middle(Parent): pass\n",
        C: "from ..b.configuration_b import Middle\nclass Child(Middle):\n    base_model_ep_plan = None\n",
    }
    found = EffectivePlans(sources(files)).compute_file_plans(C)
    entries = found[PlanVariant(C, "Child", "base_model_tp_plan")]
    assert {key: (entry.style, entry.path, entry.line) for key, entry in entries.items()} == {
        "a": ("colwise", A, 3),
        "b": ("rowwise", A, 3),
    }
    assert found[PlanVariant(C, "Child", "base_model_ep_plan")] == {}


def test_an_own_plan_replaces_the_inherited_one_whole():
    own = 'from ..a.configuration_a import Parent\nclass Child(Parent):\n    base_model_tp_plan = {"c": "colwise"}\n'
    assert plan_of({A: PARENT, B: own}, B, "Child") == {"c": "colwise"}


@pytest.mark.parametrize(
    "text",
    [
        "from ..a import Parent\nclass Child(Parent): pass\n",
        "from ..a.configuration_a import Parent\nclass Other: pass\nclass Child(Other, Parent): pass\n",
        "from ..a.configuration_a import Child\nclass Child(Child): pass\n",
        "from ..c.configuration_c import Parent\nclass Child(Parent): pass\n",
        "from transformers.models.a.configuration_a import Parent\nclass Child(Parent): pass\n",
        "from ..a.configuration_a import Parent as Base\nclass Child(Base): pass\n",
        "from ..a import configuration_a as c\nclass Child(c.Parent): pass\n",
        "from .. import a\nclass Child(a.configuration_a.Parent): pass\n",
        "import transformers.models.a.configuration_a as c\nclass Child(c.Parent): pass\n",
        "import transformers.models.a.configuration_a\n\n"
        "class Child(transformers.models.a.configuration_a.Parent): pass\n",
        "try:\n    from ..a.configuration_a import Parent\nexcept ImportError: pass\nclass Child(Parent): pass\n",
        "from ..a.configuration_a import *\nclass Child(Parent): pass\n",
        "from ..a.configuration_a import Parent\nBase = Parent\nclass Child(Base): pass\n",
    ],
    ids=[
        "from the package",
        "second base",
        "of the same name",
        "passed on by another file",
        "absolute",
        "alias",
        "module",
        "package",
        "absolute module",
        "absolute name",
        "in try",
        "everything",
        "another name",
    ],
)
def test_ways_to_a_parent(text):
    files = {A: PARENT + "class Child(Parent): pass\n", B: text, C: "from ..a.configuration_a import Parent\n"}
    assert plan_of(files, B, "Child") == {"a": "colwise", "b": "rowwise"}
    assert B in find_dependents([A], ImportIndex([A, B], sources(files))) or text.startswith("from ..c")


def test_a_parent_inside_of_another_class():
    outer = (
        "class Outer:\n    class Parent:\n        base_model_tp_plan = {'a': 'colwise'}\n"
        "    class Child(Parent): pass\n"
    )
    files = {A: outer, B: "from ..a.configuration_a import Outer\nclass Child(Outer.Parent): pass\n"}
    assert plan_of(files, B, "Child") == plan_of(files, A, "Outer.Child") == {"a": "colwise"}


def test_a_diamond_is_looked_up_as_python_does():
    text = """
    class Top:
        base_model_tp_plan = {"top": "colwise"}
    class Left(Top): pass
    class Right(Top):
        base_model_tp_plan = {"right": "colwise"}
    class Bottom(Left, Right): pass
    """
    namespace: dict[str, type] = {}
    exec(textwrap.dedent(text), namespace)
    assert plan_of({A: text}, A, "Bottom") == namespace["Bottom"].base_model_tp_plan == {"right": "colwise"}


@pytest.mark.parametrize(
    "text",
    [
        "from ..a.configuration_a import Child\nclass Child(Child): pass\n",
        "from ..b.configuration_b import Other\nclass Child(Other): pass\nclass Other(Child): pass\n",
        "from ................ import x\nfrom ................a.b import Parent\nclass Child(Parent): pass\n",
    ],
)
def test_circles_and_imports_from_nowhere_end(text):
    files = {A: "from ..b.configuration_b import Child\nclass Child(Child): pass\n", B: text}
    assert plan_of(files, B, "Child") is None


def test_many_diamonds_take_no_longer_than_few():
    text = "class C0:\n    base_model_tp_plan = {'a': 'colwise'}\n"
    text += "".join(
        f"class L{n}(C{n}): pass\nclass R{n}(C{n}): pass\nclass C{n + 1}(L{n}, R{n}): pass\n" for n in range(60)
    )
    assert plan_of({A: text}, A, "C60") == {"a": "colwise"}


@pytest.mark.slow
def test_inheritance_too_deep_to_follow_is_an_error():
    text = "class M: pass\nclass C0: pass\n" + "".join(f"class C{n + 1}(C{n}, M): pass\n" for n in range(1500))
    files = {A: "from ..b.configuration_b import C1500\nclass Child(C1500): pass\n", B: text}
    with pytest.raises(SourceError, match="inherit too deeply"):
        plan_of(files, A, "Child")


def test_a_chain_of_heirs_is_worked_out_class_by_class(monkeypatch):
    """Each class adds what is its own to what its base has: twice as many classes are twice as much work."""
    steps: list[str] = []
    apply_own = EffectivePlans._apply_own

    def count(self, inherited, key, **options):
        steps.append(key[1])
        return apply_own(self, inherited, key, **options)

    monkeypatch.setattr(EffectivePlans, "_apply_own", count)
    chain = "".join(f"class C{n + 1}(C{n}): pass\n" for n in range(1500))
    plans = EffectivePlans(sources({A: "class C0:\n    base_model_tp_plan = {'a': 'colwise'}\n" + chain}))
    entries = plans.compute_file_plans(A)[PlanVariant(A, "C1500", "base_model_tp_plan")]
    assert {key: entry.style for key, entry in entries.items()} == {"a": "colwise"}
    assert len(steps) == len(set(steps)) == 1502


def test_a_parent_that_cannot_be_parsed_is_an_error_each_time():
    parent = "from ..a.configuration_a import Parent\nclass Child(Parent): pass\n"
    plans = EffectivePlans(sources({A: "class Parent(\n", B: parent, C: parent.replace("Child", "Other")}))
    for path in (B, B, C):
        with pytest.raises(SourceError, match="does not parse"):
            plans.compute_file_plans(path)


def test_what_code_adds_is_a_plan_of_its_own():
    text = """
    class Child:
        base_model_sp_plan = {"a": "colwise"}
        def __post_init__(self):
            for i in range(3):
                if i < self.dense:
                    self.base_model_sp_plan.update({f"layers.{i}.mlp": "rowwise"})
    """
    assert plan_of({A: text}, A, "Child", "base_model_sp_plan") == {"a": "colwise"}
    label = "base_model_sp_plan in __post_init__ if i < self.dense"
    assert plan_of({A: text}, A, "Child", label) == {"layers.*.mlp": "rowwise"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('self.base_model_tp_plan.pop("a")', {"a": REMOVED}),
        ('del self.base_model_tp_plan["a"]', {"a": REMOVED}),
        ("self.base_model_tp_plan.clear()", {EVERY_KEY: REMOVED}),
        ("self.base_model_tp_plan = None", {EVERY_KEY: REMOVED}),
        ('self.base_model_tp_plan = {"c": "colwise"}', {EVERY_KEY: REMOVED, "c": "colwise"}),
        ('self.base_model_tp_plan.update({"c": "colwise"})', {"c": "colwise"}),
    ],
)
def test_what_code_takes_out_of_a_plan_is_an_entry_too(line, expected):
    text = PARENT + f"    def __init__(self):\n        {line}\n"
    assert plan_of({A: text}, A, "Parent") == {"a": "colwise", "b": "rowwise"}
    assert plan_of({A: text}, A, "Parent", "base_model_tp_plan in __init__") == expected


def test_what_a_function_does_to_a_plan_is_inherited_with_it():
    text = PARENT + '    def __init__(self):\n        self.base_model_tp_plan.pop("a")\n'
    files = {A: text, B: "from ..a.configuration_a import Parent\nclass Child(Parent): pass\n"}
    assert plan_of(files, B, "Child", "base_model_tp_plan in __init__") == {"a": REMOVED}


def test_the_arms_of_a_condition_are_plans_of_their_own():
    text = """
    class Parent:
        base_model_tp_plan = {"a": "colwise"} if FUSED else {"b": "rowwise"}
    class Child(Parent): pass
    class Own(Parent):
        base_model_tp_plan = {"c": "colwise"}
    """
    for name in ("Parent", "Child"):
        assert plan_of({A: text}, A, name, "base_model_tp_plan if FUSED") == {"a": "colwise"}
        assert plan_of({A: text}, A, name, "base_model_tp_plan if not (FUSED)") == {"b": "rowwise"}
    assert plan_of({A: text}, A, "Own", "base_model_tp_plan if FUSED") is None
    assert plan_of({A: text}, A, "Own") == {"c": "colwise"}


BASE = 'BASE = {"a": "colwise", "b": "rowwise"}\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{BASE}class Child:\n    base_model_tp_plan = BASE\nx = BASE\n", {"a": "colwise", "b": "rowwise"}),
        (
            f"{BASE}x = BASE\nclass Child:\n    base_model_tp_plan = {{**BASE, 'a': 'rowwise'}}\n",
            {"a": "rowwise", "b": "rowwise"},
        ),
        (
            f"{BASE}x = BASE\nclass Child:\n    base_model_tp_plan = {{'a': 'rowwise', **BASE}}\n",
            {"a": "colwise", "b": "rowwise"},
        ),
        (
            f"{BASE}class Child:\n    base_model_tp_plan = {{**BASE, 'a': 'rowwise'}}\n",
            {"a": "rowwise", "b": "rowwise"},
        ),
        ("class Child:\n    OWN = {'a': 'colwise'}\n    base_model_tp_plan = OWN\n    x = OWN\n", {"a": "colwise"}),
        (
            "from ..a.configuration_a import Parent\nclass Child:\n"
            "    base_model_tp_plan = Parent.base_model_tp_plan.copy()\n",
            {"a": "colwise", "b": "rowwise"},
        ),
        (
            "from ..c.configuration_c import PASSED\nclass Child:\n    base_model_tp_plan = dict(PASSED)\n",
            {"c": "colwise"},
        ),
        ("STYLE = 'rowwise'\nclass Child:\n    base_model_tp_plan = {'a': STYLE}\n", {"a": "rowwise"}),
    ],
    ids=["twice", "spread", "spread last", "once", "of the class", "parent", "passed on", "style"],
)
def test_constants_and_other_plans_are_followed(text, expected):
    files = {
        A: PARENT,
        B: text,
        C: "from ..d.configuration_d import ORIGIN as PASSED\n",
        D: "ORIGIN = {'c': 'colwise'}\n",
    }
    assert plan_of(files, B, "Child") == expected


@pytest.mark.parametrize(
    "text",
    [
        f"{BASE}BASE = make()\nclass Child:\n    base_model_tp_plan = BASE\n",
        f"{BASE}BASE.update(a='rowwise')\nclass Child:\n    base_model_tp_plan = BASE\n",
        f"{BASE}del BASE['a']\nclass Child:\n    base_model_tp_plan = BASE\n",
        "class Child:\n    base_model_tp_plan = make()\n",
        "class Child:\n    base_model_tp_plan = Child.base_model_tp_plan if A else make()\n",
        "class Child:\n    base_model_tp_plan = {**Other.base_model_tp_plan}\n"
        "class Other:\n    base_model_tp_plan = {**Child.base_model_tp_plan}\n",
        "from ..a.configuration_a import Parent\nclass Child:\n"
        "    base_model_tp_plan = {k: v for k, v in Parent.base_model_tp_plan.items() if k != 'a'}\n",
    ],
    ids=["assigned twice", "updated", "deleted from", "call", "arm", "circle", "filtered"],
)
def test_what_cannot_be_followed_is_said_to_be_unread(text):
    found = EffectivePlans(sources({A: PARENT, B: text})).compute_file_plans(B)
    plans = [plan for place, plan in found.items() if place.class_name == "Child" and plan]
    assert [list(plan) for plan in plans] == [[UNRESOLVED]]
    assert plans[0][UNRESOLVED].style is None
    assert plans[0][UNRESOLVED].provenance


def test_a_parameter_of_a_constants_name_is_not_the_constant():
    text = f"{BASE}x = BASE\nclass Child:\n    def f(self, BASE):\n        self.base_model_tp_plan |= BASE\n"
    assert plan_of({B: text}, B, "Child", "base_model_tp_plan in f") == {UNRESOLVED: None}


def test_the_parents_plan_by_super():
    text = (
        "from ..a.configuration_a import Parent\nclass Child(Parent):\n    base_model_tp_plan = None\n"
        "    def f(self):\n        self.base_model_tp_plan = {**super().base_model_tp_plan}\n"
    )
    expected = {EVERY_KEY: REMOVED, "a": "colwise", "b": "rowwise"}
    assert plan_of({A: PARENT, B: text}, B, "Child", "base_model_tp_plan in f") == expected


def test_inheritors_are_found_however_indirect():
    files = {
        A: PARENT,
        B: "from ..a.configuration_a import (\n    Parent,\n)\nclass Middle(Parent): pass\n",
        C: "from transformers.models.b.configuration_b import Middle\nclass Child(Middle): pass\n",
        Path("src/transformers/models/d/configuration_d.py"): "from ..a.configuration_a import Parent\nx = Parent\n",
    }
    assert find_dependents([A], ImportIndex(files, sources(files))) == {A, B, C}
    assert find_dependents([C], ImportIndex(files, sources(files))) == {C}


def test_modular_files_are_no_models():
    assert [
        file_kind(Path(f"x/{name}_x.py")) for name in ("configuration", "modeling", "modular", "test_modeling")
    ] == [
        "configuration",
        "modeling",
        None,
        None,
    ]


def test_every_configuration_class_of_transformers_has_the_plans_that_python_gives_it(installed_transformers):
    plans = EffectivePlans(lambda path: SourceFile(path, path.read_bytes()) if path.is_file() else None)
    compared = 0
    for path in sorted((installed_transformers / "models").glob("*/configuration_*.py")):
        if b"_plan" not in path.read_bytes():
            continue
        module = importlib.import_module(
            ".".join(path.relative_to(installed_transformers.parent).with_suffix("").parts)
        )
        for place, entries in plans.compute_file_plans(path).items():
            if place.class_name == "HrmTextConfig":  # a comprehension: its keys are known with a wildcard only
                continue
            value = getattr(getattr(module, place.class_name), place.plan)
            assert {key: entry.style for key, entry in entries.items()} == (value or {}), place
            compared += len(entries)
    assert compared > 1400
