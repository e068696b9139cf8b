"""Plans that other code fills, changes or hands on: never half-migrated, and never left unseen.

Each case is imported by Python before and after the rewrite. A plan whose entries end in two vocabularies was migrated
halfway; one that keeps its old entries must be named by `check`.
"""

from __future__ import annotations

import pytest

from codemods.checking.check import check_paths
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes
from tests.codemods.evaluation import BASE, Evaluator
from tests.codemods.helpers import codes, write_tree
from tests.migrator.source_trees import MODELING

KEY = '"layers.*.mlp.experts.down_proj"'
GATE_UP = '"layers.*.mlp.experts.gate_up_proj": "packed_colwise"'
DOWN = f'{KEY}: "rowwise"'
ENTRIES = f'{{{GATE_UP}, {DOWN}, "layers.*.mlp.experts": "moe_tp_experts"}}'
PAIRS = '{"gate_up_proj": "packed_colwise", "down_proj": "rowwise"}'
HALF = "'rowwise' if 'down' in key else style"

CONFIG = "from tree.base import PreTrainedConfig\n"
TOY = "models/toy/configuration_toy.py"


@pytest.fixture(scope="module")
def evaluator():
    running = Evaluator()
    yield running
    running.close()


def fill(text):
    """Replace the words in capitals that stand for entries of the plan, and PLAN by its name."""
    words = {"ENTRIES": ENTRIES, "DOWN": DOWN, "GATE_UP": GATE_UP, "KEY": KEY, "PAIRS": PAIRS, "HALF": HALF}
    for word, meaning in words.items():
        text = text.replace(f"${word}", meaning)
    return text.replace("$PLAN", "base_model_tp_plan").replace("$COPY", COPY)


COPY = f"{{key: {HALF} for key, style in self.base_model_tp_plan.items()}}"


def body(text, base="PreTrainedConfig", name="ToyConfig"):
    return f"class {name}({base}):\n" + "".join(f"    {line}\n" for line in text.splitlines())


def method(text, plan="$ENTRIES"):
    lines = "".join(f"\n    {line}" for line in text.splitlines())
    return body(f"$PLAN = {plan}\ndef __init__(self, new=False, **keywords):{lines}")


WHOLE = body("$PLAN = $ENTRIES")


def run(evaluator, root, files):
    """Rewrite a tree; return its outcome and what `check` says, after the two promises were tested."""
    with_base = {f"tree/{name}": fill(text) for name, text in {"base.py": BASE, **files}.items()}
    packages = {f"{'/'.join(name.split('/')[:depth])}/__init__.py" for name in with_base for depth in (1, 2, 3)}
    packages = {name for name in packages if not name.removesuffix("/__init__.py").endswith(".py")}
    write_tree(root, {**dict.fromkeys(packages, ""), **with_base})
    before = evaluator.evaluate(root)
    assert before.errors == []
    checked = check_paths([root / "tree"], source="transformers-5.23")
    outcome = plan_rewrites([root / "tree"])
    assert (outcome.errors, checked.errors) == ((), ())
    assert write_changes(outcome.changes).errors == ()
    after = evaluator.evaluate(root)
    assert before.plans.keys() == after.plans.keys()
    words = after.vocabularies()
    halves = [name for name, found in words.items() if found != before.vocabularies()[name] and found != {"new"}]
    assert halves == []
    is_named = {"MIG202", "MIG203", "MIG204"} & set(codes(checked))
    assert is_named or not any("old" in found for found in words.values()), "the old plan is not named"
    assert plan_rewrites([root / "tree"]).changes == ()
    return outcome, checked


def run_config(evaluator, root, text):
    return run(evaluator, root, {TOY: CONFIG + text, "models/toy/modeling_toy.py": MODELING})


SAME_FILE = {
    # another name for the dict
    "chained assignment": body('default_plan = $PLAN = $ENTRIES\ndefault_plan[$KEY] = "rowwise"'),
    "chained, update": body("$PLAN = default_plan = $ENTRIES\ndefault_plan.update({$DOWN})"),
    "a name in the class body": body('$PLAN = $ENTRIES\nother = $PLAN\nother[$KEY] = "rowwise"'),
    "a name in the module": f'{WHOLE}PLAN = ToyConfig.$PLAN\nPLAN[$KEY] = "rowwise"\n',
    "a name in a function": f'{WHOLE}PLAN = ToyConfig.$PLAN\ndef f():\n    PLAN[$KEY] = "rowwise"\nf()\n',
    "a walrus in a method": method('(plan := self.$PLAN)[$KEY] = "rowwise"'),
    "a walrus in the body": body('$PLAN = (plan := $ENTRIES)\nplan[$KEY] = "rowwise"'),
    "an attribute": method('self.plan = self.$PLAN\nself.plan[$KEY] = "rowwise"'),
    "another plan": method('self._tp_plan = self.$PLAN\nself._tp_plan[$KEY] = "rowwise"'),
    "one plan after another": method(
        "plan = self.$PLAN\nplan.update({$DOWN})\nplan = self._tp_plan\nplan.update({$GATE_UP})"
    ),
    "the other plan first": method(
        "plan = self._tp_plan\nplan.update({$GATE_UP})\nplan = self.$PLAN\nplan.update({$DOWN})"
    ),
    "a plan or another": method(
        "if self._tp_plan:\n    plan = self._tp_plan\n    plan.update({$GATE_UP})\n"
        "else:\n    plan = self.$PLAN\n    plan.update({$DOWN})"
    ),
    "a list": method('plans = [self.$PLAN]\nplans[0][$KEY] = "rowwise"'),
    "a dict of plans": method('for name, plan in {"tp": self.$PLAN}.items():\n    plan[$KEY] = "rowwise"'),
    "a closure": method('plan = self.$PLAN\ndef inner():\n    plan[$KEY] = "rowwise"\ninner()'),
    # functions that receive, return or bind it
    "a function": 'def f(plan):\n    plan[$KEY] = "rowwise"\n' + method("f(self.$PLAN)"),
    "a function's result": "def f(plan):\n    return plan | {$DOWN}\n" + method("self.$PLAN = f(self.$PLAN)"),
    "a method": method("self.fix(self.$PLAN)") + '    def fix(self, plan):\n        plan[$KEY] = "rowwise"\n',
    "a getter": method('self.get()[$KEY] = "rowwise"') + "    def get(self):\n        return self.$PLAN\n",
    "a property": method('self.x[$KEY] = "rowwise"') + "    @property\n    def x(self):\n        return self.$PLAN\n",
    "a bound method": method("update = self.$PLAN.update\nupdate({$DOWN})"),
    "a partial": "from functools import partial\n" + method('partial(self.$PLAN.__setitem__, $KEY)("rowwise")'),
    "map": method("any(map(self.$PLAN.update, [{$DOWN}]))"),
    "operator": "import operator\n" + method('operator.setitem(self.$PLAN, $KEY, "rowwise")'),
    # made anew from its own entries
    "a comprehension": method("self.$PLAN = $COPY"),
    "a map of styles": f'STYLES = {{{KEY}: "rowwise"}}\n'
    + method("self.$PLAN = {key: STYLES.get(key, style) for key, style in self.$PLAN.items()}"),
    "pairs": method("self.$PLAN = dict((key, $HALF) for key, style in self.$PLAN.items())"),
    "a list of pairs": method("self.$PLAN = dict([(key, $HALF) for key, style in self.$PLAN.items()])"),
    "a loop over entries": method(
        "plan = {}\nfor key, style in self.$PLAN.items():\n    plan[key] = $HALF\nself.$PLAN = plan"
    ),
    "a loop over keys": method(
        'for key in list(self.$PLAN):\n    if key.endswith("down_proj"):\n        self.$PLAN[key] = "rowwise"'
    ),
    "a comprehension in the body": body(
        "$PLAN = $ENTRIES\n$PLAN = {key: $HALF for key, style in $PLAN.items()}".replace("$HALF", f"({HALF})")
    ),
    "a loop in the body": body("$PLAN = $ENTRIES\nfor key, style in list($PLAN.items()):\n    $PLAN[key] = $HALF"),
    "a chain of maps": "from collections import ChainMap\n" + method("self.$PLAN = ChainMap({$DOWN}, self.$PLAN)"),
    "a conditional body": body("$PLAN = $ENTRIES\nif True:\n    $PLAN = {**$PLAN, $DOWN}"),
    "its own class": method("self.$PLAN = {**ToyConfig.$PLAN, $DOWN}"),
    "getattr of itself": method('self.$PLAN = {**getattr(self, "$PLAN"), $DOWN}'),
    # names that are computed
    "getattr": method('getattr(self, "$PLAN")[$KEY] = "rowwise"'),
    "vars": method('vars(type(self))["$PLAN"][$KEY] = "rowwise"'),
    "__dict__": f'{WHOLE}ToyConfig.__dict__["$PLAN"].update({{$DOWN}})\n',
    "locals": body('$PLAN = $ENTRIES\nlocals()["$PLAN"][$KEY] = "rowwise"'),
    "an f-string": method(
        'for kind in ("tp", "sp"):\n    plan = getattr(self, f"base_model_{kind}_plan", None)\n'
        '    if plan:\n        plan[$KEY] = "rowwise"'
    ),
    "a loop over names": method('for name in ("$PLAN",):\n    getattr(self, name)[$KEY] = "rowwise"'),
    "setattr of a name": method('name = "$PLAN"\nsetattr(self, name, {**self.$PLAN, $DOWN})'),
    "setattr outside": f'{WHOLE}setattr(ToyConfig, "$PLAN", {{**ToyConfig.$PLAN, $DOWN}})\n',
    "exec": body("$PLAN = $ENTRIES\nexec(\"$PLAN['layers.*.mlp.experts.down_proj'] = 'rowwise'\")"),
    # objects of a class that is not named
    "an alias of the class": f'{WHOLE}T = ToyConfig\nT.$PLAN[$KEY] = "rowwise"\n',
    "a loop over classes": f'{WHOLE}for T in (ToyConfig,):\n    T.$PLAN[$KEY] = "rowwise"\n',
    "a class decorator": f'def f(cls):\n    cls.$PLAN[$KEY] = "rowwise"\n    return cls\n@f\n{WHOLE}',
    "a decorator's argument": "def f(**given):\n    def inner(cls):\n        cls.$PLAN.update(given['tp_plan'])\n"
    f"        return cls\n    return inner\n@f(tp_plan={{$DOWN}})\n{WHOLE}",
    "a function of a config": f"{WHOLE}def f(config):\n    config.$PLAN = {{**config.$PLAN, $DOWN}}\nf(ToyConfig)\n",
    "a metaclass": "class Meta(type):\n    def __new__(mcs, name, bases, space):\n"
    '        space["$PLAN"][$KEY] = "rowwise"\n        return super().__new__(mcs, name, bases, space)\n'
    + body("$PLAN = $ENTRIES", base="metaclass=Meta"),
    "__init_subclass__": body(
        "$PLAN = $ENTRIES\ndef __init_subclass__(cls, **keywords):\n    cls.$PLAN = {**cls.$PLAN, $DOWN}"
    )
    + body("pass", "ToyConfig", "HeirConfig"),
    # heirs
    "an heir's method": WHOLE + body("def __init__(self):\n    self.$PLAN = $COPY", "ToyConfig", "HeirConfig"),
    "an heir's copy": WHOLE + body("$PLAN = dict(ToyConfig.$PLAN)\n$PLAN.update({$DOWN})", "ToyConfig", "HeirConfig"),
    "an heir's property": WHOLE
    + body("@property\ndef $PLAN(self):\n    return {**ToyConfig.$PLAN, $DOWN}", "ToyConfig", "HeirConfig"),
    "super": WHOLE + body("def __init__(self):\n    self.$PLAN = {**super().$PLAN, $DOWN}", "ToyConfig", "HeirConfig"),
}


@pytest.mark.parametrize("text", SAME_FILE.values(), ids=SAME_FILE)
def test_code_that_changes_one_half_holds_the_plan(evaluator, tmp_path, text):
    outcome, _ = run_config(evaluator, tmp_path, text)
    assert outcome.changes == ()


KEYED = '{f"layers.*.mlp.experts.{n}": s for n, s in $PAIRS.items()}'
FORMS = {
    "f-string keys": body(f"$PLAN = {KEYED}"),
    "f-string keys of a list": body(
        '$PLAN = {f"layers.*.mlp.experts.{n}": s for n, s in '
        '[("gate_up_proj", "packed_colwise"), ("down_proj", "rowwise")]}'
    ),
    "f-string keys of zip": body(
        '$PLAN = {f"layers.*.mlp.experts.{n}": s for n, s in '
        'zip(("gate_up_proj", "down_proj"), ("packed_colwise", "rowwise"))}'
    ),
    "f-string keys of a constant": f"NAMES = {PAIRS}\n"
    + body('$PLAN = {f"layers.*.mlp.experts.{n}": s for n, s in NAMES.items()}'),
    "sums as keys": body('$PLAN = {"layers.*.mlp.experts." + n: s for n, s in $PAIRS.items()}'),
    "keys by percent": body('$PLAN = {"layers.*.mlp.experts.%s" % n: s for n, s in $PAIRS.items()}'),
    "nested loops": body('$PLAN = {f"layers.*.{m}.experts.{n}": s for m in ("mlp",) for n, s in $PAIRS.items()}'),
    "styles by name": f"STYLES = {PAIRS}\n"
    + body('$PLAN = {f"layers.*.mlp.experts.{n}": STYLES[n] for n in ("gate_up_proj", "down_proj")}'),
    "a computed module": 'X = "experts"\n'
    + body('$PLAN = {f"layers.*.mlp.{X}.gate_up_proj": "packed_colwise", f"layers.*.mlp.{X}.down_proj": "rowwise"}'),
    "f-string keys in a method": method(f"self.$PLAN.update({KEYED})", "{}"),
    "a loop in the body": body('$PLAN = {}\nfor n, s in $PAIRS.items():\n    $PLAN[f"layers.*.mlp.experts.{n}"] = s'),
    "a property": body("@property\ndef $PLAN(self):\n    return $ENTRIES"),
    "a property that changes it": body(
        '@property\ndef $PLAN(self):\n    plan = $ENTRIES\n    plan[$KEY] = "rowwise"\n    return plan'
    ),
    "a cached property": "from functools import cached_property\n"
    + body("@cached_property\ndef $PLAN(self):\n    return $ENTRIES"),
    "a class method": body("@classmethod\ndef $PLAN(cls):\n    return $ENTRIES"),
    "a static method": body("@staticmethod\ndef $PLAN():\n    return $ENTRIES"),
    "a property of a lambda": body("$PLAN = property(lambda self: $ENTRIES)"),
    "a property of a function": body("def get(self):\n    return $ENTRIES\n$PLAN = property(get)"),
    "__getattr__": body(
        'def __getattr__(self, name):\n    if name == "$PLAN":\n        return $ENTRIES\n    raise KeyError'
    ),
    "a descriptor": "class Plan:\n    def __get__(self, one, owner):\n        return $ENTRIES\n"
    + body("$PLAN = Plan()"),
    "a class keyword": body("pass", base="PreTrainedConfig, tp_plan=$ENTRIES"),
    "a class keyword by its full name": body("pass", base="PreTrainedConfig, $PLAN=$ENTRIES"),
    "a class keyword of a name": "TP = $ENTRIES\n" + body("pass", base="PreTrainedConfig, tp_plan=TP"),
    "class keywords of a dict": body("pass", base='PreTrainedConfig, **{"tp_plan": $ENTRIES}'),
    "setattr": body("pass") + 'setattr(ToyConfig, "$PLAN", $ENTRIES)\n',
    "setattr of an f-string": body("pass")
    + 'for kind in ("tp",):\n    setattr(ToyConfig, f"base_model_{kind}_plan", $ENTRIES)\n',
    "setattr of a loop's name": body("pass") + 'for name in ("$PLAN",):\n    setattr(ToyConfig, name, $ENTRIES)\n',
    "vars": body('vars()["$PLAN"] = $ENTRIES'),
    "locals": body("locals().update($PLAN=$ENTRIES)"),
    "type": 'ToyConfig = type("ToyConfig", (PreTrainedConfig,), {"$PLAN": $ENTRIES})\n',
    "type, a computed name": "BASES = (PreTrainedConfig,)\n"
    'ToyConfig = type("ToyConfig", BASES, {"base_model_" + "tp_plan": $ENTRIES})\n',
    "make_dataclass": "from dataclasses import field, make_dataclass\n"
    'ToyConfig = make_dataclass("ToyConfig", [("$PLAN", dict, field(default_factory=lambda: $ENTRIES))])\n',
    "a field": "from dataclasses import dataclass, field\n@dataclass\n"
    + body("$PLAN: dict = field(default_factory=lambda: $ENTRIES)"),
    "match": method("match new:\n    case True:\n        self.$PLAN = $ENTRIES\n    case _:\n        pass", "{}"),
    "try": body("try:\n    import nothing_like_this\n    $PLAN = {}\nexcept ImportError:\n    $PLAN = $ENTRIES"),
    "a starred target": body("$PLAN, *rest = [$ENTRIES, 1]"),
    "a nested target": body("(one, $PLAN), two = (1, $ENTRIES), 2"),
    "a loop's target": body("for $PLAN in [$ENTRIES]:\n    pass"),
    "a with target": "import contextlib\n" + body("with contextlib.nullcontext($ENTRIES) as $PLAN:\n    pass"),
    "a match target": body("match $ENTRIES:\n    case $PLAN:\n        pass"),
    "a global": "def f():\n    global PLAN\n    PLAN = $ENTRIES\nf()\n" + body("$PLAN = PLAN"),
    "a partial": "from functools import partial\nmake = partial(dict, $ENTRIES)\n" + body("$PLAN = make()"),
    "a named tuple": "from typing import NamedTuple\nclass Plans(NamedTuple):\n    tp_plan: dict = $ENTRIES\n"
    + body("$PLAN = Plans().tp_plan"),
    "an enum": "from enum import Enum\nclass Plans(Enum):\n    TP = $ENTRIES\n" + body("$PLAN = Plans.TP.value"),
    "a dict of its own kind": "class Plan(dict):\n    pass\n" + body("$PLAN = Plan($ENTRIES)"),
    "json": "import json\n" + body("$PLAN = json.loads('$ENTRIES')"),
    "eval": body("$PLAN = eval('$ENTRIES')"),
    "an item": body('$PLAN = {"a": $ENTRIES}["a"]'),
    "a called lambda": body("$PLAN = (lambda: $ENTRIES)()"),
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_no_form_of_a_plan_is_left_unseen(evaluator, tmp_path, text):
    run_config(evaluator, tmp_path, text)


@pytest.mark.parametrize(
    "value",
    [
        "{{ tp_plan }}",
        "{{ cookiecutter.tp_plan }}",
        "[[ tp_plan ]]",
        "make(tp_plan)",
        "(tp_plan, 1)[0]",
        "tp_plan or x",
    ],
)
def test_a_template_is_no_plan_that_is_read_elsewhere(tmp_path, value):
    write_tree(tmp_path, {"toy/configuration_toy.py": body(f"base_model_tp_plan = {value}")})
    outcome = check_paths([tmp_path], source="transformers-5.23")
    assert [(found.line, found.finding.code) for found in outcome.findings] == [(2, "MIG204")]


def beside(text, base="PreTrainedConfig", imports="from ..toy.configuration_toy import ToyConfig\n", after=""):
    return {
        TOY: CONFIG + WHOLE,
        "models/other/configuration_other.py": CONFIG + imports + body(text, base, "OtherConfig") + after,
        "models/other/modeling_other.py": MODELING.replace("Toy", "Other"),
    }


def patched(text):
    return {TOY: CONFIG + WHOLE, "tools/patch.py": "from ..models.toy.configuration_toy import ToyConfig\n" + text}


def inheriting(mixin, where="models/toy/mixin.py", imports="from .mixin import Mixin\n"):
    code = "class Mixin:\n    def __init__(self, **keywords):\n        " + mixin + "\n"
    return {TOY: CONFIG + imports + body("$PLAN = $ENTRIES", "Mixin, PreTrainedConfig"), where: code}


ELSEWHERE = {
    "a union": beside("$PLAN = ToyConfig.$PLAN | {$DOWN}"),
    "an absolute import": beside(
        "$PLAN = ToyConfig.$PLAN | {$DOWN}", imports="from tree.models.toy.configuration_toy import ToyConfig\n"
    ),
    "an imported module": beside(
        "$PLAN = module.ToyConfig.$PLAN | {$DOWN}", imports="from ..toy import configuration_toy as module\n"
    ),
    "an alias": beside("$PLAN = T.$PLAN | {$DOWN}", imports="from ..toy.configuration_toy import ToyConfig as T\n"),
    "a re-export": {
        **beside("$PLAN = ToyConfig.$PLAN | {$DOWN}", imports="from ..toy import ToyConfig\n"),
        "models/toy/__init__.py": "from .configuration_toy import ToyConfig\n",
    },
    "a copy": beside('$PLAN = ToyConfig.$PLAN.copy()\n$PLAN[$KEY] = "rowwise"'),
    "a dict of it": beside("$PLAN = dict(ToyConfig.$PLAN, **{$DOWN})"),
    "a deep copy": beside('import copy\n$PLAN = copy.deepcopy(ToyConfig.$PLAN)\n$PLAN[$KEY] = "rowwise"'),
    "a round trip": beside('import json\n$PLAN = json.loads(json.dumps(ToyConfig.$PLAN))\n$PLAN[$KEY] = "rowwise"'),
    "pairs of it": beside('$PLAN = dict([*ToyConfig.$PLAN.items(), ($KEY, "rowwise")])'),
    "a comprehension": beside("$PLAN = {key: $HALF for key, style in ToyConfig.$PLAN.items()}"),
    "an heir's method": beside("def __init__(self):\n    self.$PLAN = $COPY", "ToyConfig"),
    "an heir's item": beside('def __init__(self):\n    self.$PLAN[$KEY] = "rowwise"', "ToyConfig"),
    "super": beside("def __init__(self):\n    self.$PLAN = {**super().$PLAN, $DOWN}", "ToyConfig"),
    "an item": beside("pass", after='ToyConfig.$PLAN[$KEY] = "rowwise"\n'),
    "setattr": beside("pass", after='setattr(ToyConfig, "$PLAN", {**ToyConfig.$PLAN, $DOWN})\n'),
    "a tool": patched('ToyConfig.$PLAN[$KEY] = "rowwise"\n'),
    "a tool's name": patched('plan = ToyConfig.$PLAN\nplan[$KEY] = "rowwise"\n'),
    "a tool's function": patched('def f(config):\n    config.$PLAN[$KEY] = "rowwise"\nf(ToyConfig)\n'),
    "a tool's loop": patched(
        "for kind in ('tp',):\n    getattr(ToyConfig, f'base_model_{kind}_plan')[$KEY] = 'rowwise'\n"
    ),
    "a mixin": inheriting("self.$PLAN = $COPY"),
    "a mixin above": inheriting("self.$PLAN = $COPY", "mixin.py", "from ...mixin import Mixin\n"),
    "a base's item": inheriting('self.$PLAN[$KEY] = "rowwise"'),
    "a decorator": {
        TOY: f"{CONFIG}from ...tools import f\n@f\n{WHOLE}",
        "tools.py": 'def f(cls):\n    cls.$PLAN[$KEY] = "rowwise"\n    return cls\n',
    },
    "a constant of another file": beside(
        "$PLAN = {**PLAN, $DOWN}", imports="from ..toy.configuration_toy import PLAN\n"
    )
    | {TOY: CONFIG + "PLAN = $ENTRIES\n" + body("$PLAN = PLAN")},
}


@pytest.mark.parametrize("files", ELSEWHERE.values(), ids=ELSEWHERE)
def test_code_of_other_files_holds_the_plan_and_is_named(evaluator, tmp_path, files):
    outcome, checked = run(evaluator, tmp_path, {"models/toy/modeling_toy.py": MODELING, **files})
    assert outcome.changes == ()
    cause = next(name for name in files if name != TOY and not name.endswith("__init__.py"))
    messages = [found.finding.message for found in checked.findings if found.path.name == "configuration_toy.py"]
    assert any(f"{cause}:" in message for message in messages), messages


CONSTANTS = {
    "a constant": ("from .plans import PLAN\n", "$PLAN = PLAN", "PLAN = $ENTRIES\n"),
    "a plan": ("from .plans import tp_plan\n", "$PLAN = tp_plan", "tp_plan = $ENTRIES\n"),
    "a module's": ("from . import plans\n", "$PLAN = plans.tp_plan", "tp_plan = $ENTRIES\n"),
    "a class's": ("from .plans import Plans\n", "$PLAN = Plans.tp_plan", "class Plans:\n    tp_plan = $ENTRIES\n"),
    "in the class": ("", "from .plans import tp_plan as $PLAN", "tp_plan = $ENTRIES\n"),
}


@pytest.mark.parametrize(("imports", "text", "plans"), CONSTANTS.values(), ids=CONSTANTS)
def test_a_plan_that_is_imported_is_named(evaluator, tmp_path, imports, text, plans):
    files = {TOY: CONFIG + imports + body(text), "models/toy/plans.py": plans}
    run(evaluator, tmp_path, {"models/toy/modeling_toy.py": MODELING, **files})


HARMLESS = {
    "it is read": method("print(len(self.$PLAN), self.$PLAN.get('x'))\nif 'x' in self.$PLAN:\n    raise KeyError"),
    "it is copied": method("self.mine = dict(self.$PLAN)\nself.mine['x'] = 'y'"),
    "it is another plan": method("self._tp_plan = dict(self.$PLAN)"),
    "a name only reads it": method("plan = self.$PLAN\nself.size = len(plan)"),
    "an attribute only reads it": method("self.plan = self.$PLAN\nself.size = len(self.plan)"),
    "a function only reads it": "def f(plan):\n    return sorted(plan)\n" + method("self.names = f(self.$PLAN)"),
    "a getter": WHOLE
    + "    def get(self):\n        return self.$PLAN\n    def size(self):\n        return len(self.get())\n",
    "it is logged": "import logging\nlogger = logging.getLogger()\n" + method('logger.info("%s", self.$PLAN)'),
    "it is checked": "def check_plan(plan, names=None):\n    assert plan\n" + method("check_plan(self.$PLAN)"),
    "other entries are added": method('self.$PLAN = {**self.$PLAN, "norm": "colwise"}'),
    "an unknown object's other entries": f'{WHOLE}def f(config):\n    config.$PLAN["norm"] = "colwise"\nf(ToyConfig)\n',
    "an heir has its own": WHOLE + body("$PLAN = {**ToyConfig.$PLAN, $GATE_UP, $DOWN}", "ToyConfig", "HeirConfig"),
    "an heir adds": WHOLE + body('$PLAN = {**ToyConfig.$PLAN, "norm": "colwise"}', "ToyConfig", "HeirConfig"),
    "its keys get a prefix": method(
        'self._tp_plan = {}\nself._tp_plan.update({f"model.{key}": style for key, style in self.$PLAN.items()})'
    ),
    "a docstring": f'{WHOLE}    """exec of $PLAN, f"base_model_{{kind}}_plan" and getattr."""\n',
}


@pytest.mark.parametrize("text", HARMLESS.values(), ids=HARMLESS)
def test_code_that_only_reads_or_copies_holds_nothing(evaluator, tmp_path, text):
    outcome, checked = run_config(evaluator, tmp_path, text)
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]
    assert "MIG204" not in codes(checked)


def test_a_change_in_a_test_holds_nothing(evaluator, tmp_path):
    test = 'from ..models.toy.configuration_toy import ToyConfig\nToyConfig.$PLAN[$KEY] = "rowwise"\n'
    files = {TOY: CONFIG + WHOLE, "models/toy/modeling_toy.py": MODELING, "tests/test_toy.py": test}
    write_tree(tmp_path, {name: fill(text) for name, text in files.items()})
    assert [change.path.name for change in plan_rewrites([tmp_path]).changes] == ["configuration_toy.py"]


def test_what_the_library_around_the_models_does_is_its_own_affair(tmp_path):
    code = "class Base:\n    def f(self, key):\n        self._tp_plan[key] = STYLES[key]\n"
    framework = {"configuration_utils.py": code, "modeling_utils.py": code}
    files = {TOY: "from ...modeling_utils import Base\n" + body("_tp_plan = $ENTRIES", "Base"), **framework}
    files = {name: fill(text) for name, text in files.items()} | {"models/toy/modeling_toy.py": MODELING}
    # Not in `tmp_path` itself, whose siblings would be taken for models of the same tree and read.
    outcome = check_paths([write_tree(tmp_path / "library", files)], source="transformers-5.23")
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]
    assert "MIG204" not in codes(outcome)
