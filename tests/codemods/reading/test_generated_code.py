"""Generated class bodies: whatever fills, copies or changes a plan, no class ends with half of it migrated."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.codemods.evaluation import Evaluator
from tests.codemods.reading.test_unread_code import CONFIG, TOY, body, run
from tests.migrator.source_trees import MODELING

VALUES = ["{$DOWN}", "{$GATE_UP}", "{$GATE_UP, $DOWN}", '{"norm": "colwise"}', "EXTRA", "dict(EXTRA)", "make()"]
PLANS = [
    "$PLAN = $ENTRIES",
    "$PLAN = $ENTRIES",
    "$PLAN = {}",
    "$PLAN: dict = dict($ENTRIES)",
    "other = $PLAN = $ENTRIES",
    "$PLAN = CONSTANT",
    "$PLAN = {**CONSTANT}",
    "$PLAN = {**EXTRA, $GATE_UP}",
    '$PLAN = {f"layers.*.mlp.experts.{name}": style for name, style in $PAIRS.items()}',
    "$PLAN = $ENTRIES if FLAG else {}",
    "@property\ndef $PLAN(self):\n    return $ENTRIES",
    "pass",
]
CHANGES = [
    '{holder}[$KEY] = "rowwise"',
    "{holder}.update({value})",
    "{holder}.pop($KEY, None)",
    "dict.update({holder}, {value})",
    "change({holder})",
    "look({holder})",
    'for key in list({holder}):\n    if "down" in key:\n        {holder}[key] = "rowwise"',
    "saved = {holder}\nsaved.update({value})",
    "saved = dict({holder})\nsaved.update({value})",
    "{target} = {{**{holder}, **{value}}}",
    "{target} = {holder} | {value}",
    "{target} = {value}",
    "{target} = {holder}",
    "{target} = {{key: ($HALF) for key, style in {holder}.items()}}",
    "{target} = {{key: style for key, style in {holder}.items() if key}}",
    "{target} |= {value}",
]
IN_METHODS = ["self.$PLAN", "type(self).$PLAN", 'getattr(self, "$PLAN")', "ToyConfig.$PLAN", "self._tp_plan"]
IN_MODULES = ["ToyConfig.$PLAN", 'getattr(ToyConfig, "$PLAN")', 'vars(ToyConfig)["$PLAN"]']
TARGETS = ["self.$PLAN", "self._tp_plan", "self.mine"]
HEAD = """
FLAG = True
CONSTANT = $ENTRIES
EXTRA = {$DOWN}

def make():
    return {$DOWN}

def change(plan):
    plan[$KEY] = "rowwise"

def look(plan):
    return len(plan)

"""


@st.composite
def changes(draw, holders, targets):
    """One statement that may change a plan, under a condition or not."""
    change = draw(st.sampled_from(CHANGES))
    text = change.replace("{{", "{").replace("}}", "}") if "{target}" in change else change
    text = text.replace("{holder}", draw(st.sampled_from(holders))).replace("{value}", draw(st.sampled_from(VALUES)))
    text = text.replace("{target}", draw(st.sampled_from(targets)))
    if draw(st.booleans()):
        return text
    return "if new:\n" + "\n".join(f"    {line}" for line in text.splitlines())


@st.composite
def classes(draw, name, bases):
    """A class with a plan and a constructor."""
    lines = [draw(st.sampled_from(PLANS))]
    code = draw(st.lists(changes(IN_METHODS, TARGETS), max_size=2))
    if code:
        lines.append("def __init__(self, new=False, **keywords):")
        lines += [f"    {line}" for change in code for line in change.splitlines()]
    return body("\n".join(lines), draw(st.sampled_from(bases)), name)


@st.composite
def trees(draw):
    """A configuration, and another one in the same file or in another folder that may inherit from it or change it."""
    first = CONFIG + HEAD + draw(classes("ToyConfig", ["PreTrainedConfig"]))
    bases = ["PreTrainedConfig", "ToyConfig"]
    second = draw(classes("OtherConfig", bases)).replace("ToyConfig.$PLAN", draw(st.sampled_from(IN_MODULES)))
    after = "".join(f"{change}\n" for change in draw(st.lists(changes(IN_MODULES, IN_MODULES[:1]), max_size=1)))
    after = "new = False\n" + after
    try_after = "try:\n" + "".join(f"    {line}\n" for line in after.splitlines()) + "except Exception:\n    pass\n"
    if draw(st.booleans()):
        return {TOY: first + second + try_after}
    imports = "from ..toy.configuration_toy import ToyConfig\n"
    return {TOY: first, "models/other/configuration_other.py": CONFIG + imports + HEAD + second + try_after}


@pytest.fixture(scope="module")
def evaluator():
    running = Evaluator()
    yield running
    running.close()


NUMBERS = count()
MODELINGS = {
    "models/toy/modeling_toy.py": MODELING,
    "models/other/modeling_other.py": MODELING.replace("Toy", "Other"),
}


def check(evaluator, root, files):
    run(evaluator, root / str(next(NUMBERS)), MODELINGS | files)


SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
@given(trees())
def test_no_class_ends_with_two_vocabularies(evaluator, tmp_path, files):
    check(evaluator, tmp_path, files)


@pytest.mark.full
@settings(max_examples=3000, deadline=None, suppress_health_check=SLOW)
@given(trees())
def test_no_class_of_many_ends_with_two_vocabularies(evaluator, tmp_path, files):
    check(evaluator, tmp_path, files)
