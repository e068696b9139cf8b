"""Code that tells styles apart by name holds the plans whose styles arrive there, and nothing else does.

Whether a rename changes what the code does is decided by running it, with the old names and with the new ones.
"""

from __future__ import annotations

import textwrap
from itertools import product

import pytest

from codemods.checking.check import check_paths
from codemods.inheritance import style_callers
from codemods.rewriting.migrate import plan_rewrites
from tests.codemods.evaluation import BASE
from tests.codemods.helpers import codes, write_tree
from tests.codemods.reading.test_unread_code import CONFIG, ENTRIES, TOY, WHOLE, body, fill
from tests.migrator.source_trees import MODELING

RENAMED = ENTRIES.replace("packed_colwise", "moe_tp_gate_up_colwise").replace('"rowwise"', '"moe_tp_down_rowwise"')

HEAD = """
import re
from collections import defaultdict
from enum import Enum

PACKED = "packed_colwise"
OLD = {"packed_colwise", "rowwise"}
BOTH = {"packed_colwise": 1, "moe_tp_gate_up_colwise": 1, "rowwise": 2, "moe_tp_down_rowwise": 2, "moe_tp_experts": 3}
TABLE = {"packed_colwise": 1, "rowwise": 2, "moe_tp_experts": 3}
OTHERS = {"colwise": 1, "moe_tp_experts": 3}


class Style(Enum):
    PACKED = "packed_colwise"


class Places:
    packed_colwise = 1


def choose(style):
    match style:
        case "packed_colwise" | "rowwise":
            return 1
        case "moe_tp_experts":
            return 2
    return 3


def choose_either(style):
    match style:
        case "packed_colwise" | "moe_tp_gate_up_colwise":
            return 1
        case "moe_tp_experts":
            return 2
    return 3


def count(styles):
    counts = defaultdict(int)
    for style in styles:
        counts[style] += 1
    return sorted(counts.values())


def count_old(styles):
    counts = {}
    for style in styles:
        counts[style] = counts.get(style, 0) + 1
    return counts.get("rowwise", 0)


"""

SOURCES = {
    "items": "for key, style in self.$PLAN.items():\n    self.x.append($READ)",
    "values": "self.x = [$READ for style in self.$PLAN.values()]",
    "a dict": "self.x = {key: $READ for key, style in self.$PLAN.items()}",
    "an item": "for key in self.$PLAN:\n    style = self.$PLAN[key]\n    self.x.append($READ)",
    "get": "for key in self.$PLAN:\n    style = self.$PLAN.get(key)\n    self.x.append($READ)",
    "a copy": "plan = dict(self.$PLAN)\nfor style in plan.values():\n    self.x.append($READ)",
    "an attribute": "self.plan = self.$PLAN.copy()\nself.x = [$READ for style in self.plan.values()]",
    "sorted": "for key, style in sorted(self.$PLAN.items()):\n    self.x.append($READ)",
    "enumerate": "for n, (key, style) in enumerate(self.$PLAN.items()):\n    self.x.append($READ)",
    "zip": "for key, style in zip(self.$PLAN, self.$PLAN.values()):\n    self.x.append($READ)",
    "a function": "def read(style):\n    return $READ\nself.x = [read(one) for one in self.$PLAN.values()]",
    "a keyword": "def read(*, style):\n    return $READ\nself.x = [read(style=one) for one in self.$PLAN.values()]",
    "map": "def read(style):\n    return $READ\nself.x = list(map(read, self.$PLAN.values()))",
    "a lambda": "read = lambda style: $READ\nfor style in self.$PLAN.values():\n    self.x.append(read(style))",
    "a list": "found = []\nfor x in self.$PLAN.values():\n    found.append(x)\nself.x = [$READ for style in found]",
    "pairs": "for pair in self.$PLAN.items():\n    style = pair[1]\n    self.x.append($READ)",
    "unpacked": "one, two, *_ = self.$PLAN.values()\nfor style in (one, two):\n    self.x.append($READ)",
    "a walrus": "for key in self.$PLAN:\n    if style := self.$PLAN.get(key):\n        self.x.append($READ)",
    "getattr": 'for key, style in getattr(self, "$PLAN").items():\n    self.x.append($READ)',
    "a generator": "def read():\n    yield from self.$PLAN.values()\nself.x = [$READ for style in read()]",
    "plans": "for plan in (self.$PLAN,):\n    for style in plan.values():\n        self.x.append($READ)",
}

READS = {
    "equal": 'style == "packed_colwise"',
    "unequal": 'style != "rowwise"',
    "turned": '"rowwise" == style',
    "a constant": "style == PACKED",
    "an enum": "style == Style.PACKED.value",
    "a tuple": 'style in ("packed_colwise", "rowwise")',
    "a set's name": "style in OLD",
    "not in": 'style not in ["rowwise"]',
    "a table": "TABLE[style]",
    "a table's get": "TABLE.get(style, 0)",
    "a table of others": "OTHERS.get(style)",
    "a table with both": "BOTH[style]",
    "a table's keys": "style in TABLE",
    "a display": '{"rowwise": 1}.get(style)',
    "match": "choose(style)",
    "match of both": "choose_either(style)",
    "startswith": 'style.startswith("packed")',
    "endswith": 'style.endswith("colwise")',
    "contains": '"packed" in style',
    "contains what stays": '"colwise" in style',
    "split": 'style.split("_")[0] == "packed"',
    "removeprefix": 'style.removeprefix("packed_") == "colwise"',
    "upper": 'style.upper() == "ROWWISE"',
    "getattr": "getattr(Places, style, 0)",
    "either": 'style == "rowwise" or style == "moe_tp_down_rowwise"',
    "neither": 'style != "rowwise" and style != "moe_tp_down_rowwise"',
    "either of all": 'style in ("packed_colwise", "moe_tp_gate_up_colwise")',
    "another style": 'style == "colwise"',
    "no style": "style is None",
    "a type": "isinstance(style, str)",
    "chained": 'style is not None and style == "rowwise"',
    "counted": "count([style])",
    "counted by name": "count_old([style])",
}

FORMS = {
    "in values": 'self.x = "packed_colwise" in self.$PLAN.values()',
    "in items": 'self.x = ("layers.*.mlp.experts.down_proj", "rowwise") in self.$PLAN.items()',
    "an index": 'try:\n    self.x = list(self.$PLAN.values()).index("rowwise")\nexcept ValueError:\n    self.x = -1',
    "a count": 'self.x = list(self.$PLAN.values()).count("rowwise")',
    "the whole plan": "self.x = self.$PLAN == $OLD",
    "another plan": 'self.x = self.$PLAN == {"norm": "colwise"}',
    "an inverse": "by_style = {style: key for key, style in self.$PLAN.items()}\nself.x = by_style.get('rowwise')",
    "an inverse of another": "keys = {style: key for key, style in self.$PLAN.items()}\nself.x = keys.get('norm')",
    "a set": 'styles = set(self.$PLAN.values())\nself.x = "rowwise" in styles',
    "a name of itself": "styles = list(self.$PLAN.values())\nstyles = styles\nself.x = 'rowwise' in styles",
    "an attribute": "self.all = list(self.$PLAN.values())\nself.x = 'rowwise' in self.all",
    "a style in an attribute": "self.down = self.$PLAN['layers.*.mlp.experts.down_proj']\nself.x = 'row' in self.down",
    "keys": 'self.x = [key == "rowwise" for key in self.$PLAN]',
    "a key": 'self.x = "norm" in self.$PLAN',
    "a word elsewhere": 'recipe = "rowwise"\nself.x = recipe == "rowwise", len(self.$PLAN)',
    "an assertion": 'self.x = 0\nassert self.$PLAN["layers.*.mlp.experts.down_proj"] == "rowwise"',
    "any": 'self.x = any(style == "rowwise" for style in self.$PLAN.values())',
    "filter": 'self.x = len(list(filter(lambda style: style == "rowwise", self.$PLAN.values())))',
    "a lambda that calls itself": "read = lambda style: read('') if style is None else style == 'rowwise'\n"
    "self.x = [read(style) for style in self.$PLAN.values()]",
    "a conditional": 'self.x = [1 if style == "rowwise" else 2 for style in self.$PLAN.values()]',
}


def write_config(root, init):
    text = HEAD + body(f"$PLAN = $ENTRIES\ndef __init__(self, **keywords):\n{textwrap.indent(init, '    ')}")
    config = fill(CONFIG + text.replace("$OLD", ENTRIES))
    write_tree(root, {"base.py": BASE, TOY: config, "models/toy/modeling_toy.py": MODELING})
    return config


def run_config(config, entries):
    """Return what the constructor finds out, or how it fails, with some entries as the plan."""
    space = {"PreTrainedConfig": object, "__name__": "toy"}
    plan = config.replace(CONFIG, "").replace(f"base_model_tp_plan = {ENTRIES}", f"base_model_tp_plan = {entries}")
    exec(compile(plan, "toy", "exec"), space)
    try:
        return space["ToyConfig"]().x
    except Exception as error:
        return repr(error)


def check(root, init):
    config = write_config(root, f"self.x = []\n{init}")
    is_changed = run_config(config, ENTRIES) != run_config(config, RENAMED)
    outcome, checked = plan_rewrites([root]), check_paths([root], source="transformers-5.23")
    assert outcome.errors == checked.errors == ()
    assert bool(outcome.changes) != is_changed
    assert ("MIG204" in codes(checked)) == is_changed


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_each_way_to_tell_styles_apart(tmp_path, read):
    check(tmp_path, SOURCES["items"].replace("$READ", read))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_each_way_on_which_styles_arrive(tmp_path, source):
    check(tmp_path / "tells", source.replace("$READ", 'style == "packed_colwise"'))
    check(tmp_path / "other", source.replace("$READ", 'style == "colwise"'))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_is_asked_of_a_whole_plan(tmp_path, form):
    check(tmp_path, form)


@pytest.mark.full
@pytest.mark.parametrize(("source", "read"), list(product(SOURCES.values(), READS.values())))
def test_each_way_with_each_other(tmp_path, source, read):
    check(tmp_path, source.replace("$READ", f"({read})"))


PLACE = '_MAP = {"packed_colwise": 0, "rowwise": 1}\n'
READERS = {
    "of the class": "from ..models.toy.configuration_toy import ToyConfig\n"
    + PLACE
    + "def f():\n    return [_MAP[style] for style in ToyConfig.$PLAN.values()]\n",
    "of any model": PLACE + "def f(model):\n    for key, style in model._tp_plan.items():\n        yield _MAP[style]\n",
    "of any configuration": PLACE + "def f(config):\n    return {k: _MAP[v] for k, v in config.$PLAN.items()}\n",
    "of a property": 'def f(model):\n    return [key for key, style in model.tp_plan.items() if style == "rowwise"]\n',
    "of an argument": 'def f(tp_plan):\n    return [key for key, style in tp_plan.items() if style == "rowwise"]\n',
    "by an imported table": "from .table import MAP\ndef f(c):\n    return [MAP[v] for v in c.$PLAN.values()]\n",
    "by an imported name": "from .table import OLD\ndef f(c):\n    return [v == OLD for v in c.$PLAN.values()]\n",
    "by an imported function": "from .table import place\ndef f(config):\n"
    "    return [place(style) for style in config.$PLAN.values()]\n",
    "by an imported module": "from . import table\ndef f(config):\n"
    "    return [table.place(style) for style in config.$PLAN.values()]\n",
}


def run_beside(root, name, text):
    files = {TOY: CONFIG + WHOLE, "models/toy/modeling_toy.py": MODELING, name: text}
    write_tree(root / "tree", {where: fill(content) for where, content in files.items()})
    return check_paths([root / "tree"], source="transformers-5.23")


@pytest.mark.parametrize("text", READERS.values(), ids=READERS)
def test_code_of_other_files_holds_the_plans_that_reach_it(tmp_path, text):
    outcome = run_beside(tmp_path, "tools/apply.py", text)
    assert outcome.changes == ()
    messages = [found.finding.message for found in outcome.findings if found.path.name == "configuration_toy.py"]
    assert any("tools/apply.py:" in message for message in messages)


OWN = 'def f(self):\n    return [key for key, style in self.$PLAN.items() if style == "rowwise"]\n'
HARMLESS = {
    "the registry": "from .table import ALL_PARALLEL_STYLES\n"
    "def f(model):\n    return [ALL_PARALLEL_STYLES[style] for style in model._tp_plan.values()]\n",
    "the framework": "from transformers.integrations import tensor_parallel\n"
    "def f(model):\n    return [tensor_parallel.check_it(style) for style in model._tp_plan.values()]\n",
    "a log": 'def f(model, logger):\n    for key, style in model._tp_plan.items():\n        logger.info("%s", style)\n',
    "a page": "def f(model, file):\n    for key, style in model._tp_plan.items():\n        file.write(key + style)\n",
    "another class": body(f"$PLAN = {{}}\n{OWN}", "PreTrainedConfig", "OtherConfig"),
    "a word": 'def f(model, recipe):\n    return recipe == "rowwise" and len(model._tp_plan)\n',
    "torch's plans": "from torch.distributed.tensor.parallel import ColwiseParallel\n"
    'def f(model, find):\n    tp_plan = {"norm": ColwiseParallel()}\n'
    "    for name, style in tp_plan.items():\n        find(style)\n",
}


@pytest.mark.parametrize("text", HARMLESS.values(), ids=HARMLESS)
def test_code_of_other_files_that_asks_for_no_name_holds_nothing(tmp_path, text):
    outcome = run_beside(tmp_path, "tools/apply.py", text)
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]
    assert "MIG204" not in codes(outcome)


FRAMEWORKS = {
    "known by its names": {"configuration_utils.py": "", "modeling_utils.py": ""},
    "known by its classes": {
        "configs.py": "class PretrainedConfig:\n    pass\n",
        "base.py": "class PreTrainedModel(nn.Module):\n    pass\n",
    },
}


def test_tests_and_the_library_around_the_models_may_tell_styles_apart(tmp_path):
    outcome = run_beside(tmp_path / "tests", "tests/test_toy.py", READERS["of any model"])
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]
    for name, framework in FRAMEWORKS.items():
        write_tree(tmp_path / name / "tree", {**framework, "integrations.py": READERS["of any model"]})
        outcome = run_beside(tmp_path / name, "other.py", "")
        assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]


MODEL = """
class ToyModel(PreTrainedModel):
    def place(self):
        return [key for key, style in self._tp_plan.items() if style == "rowwise"]
"""


def test_a_model_reads_the_plan_of_its_configuration(tmp_path):
    files = {f"models/{name}/configuration_{name}.py": CONFIG + WHOLE for name in ("toy", "other")}
    files |= {"models/toy/modeling_toy.py": MODELING + MODEL, "models/other/modeling_other.py": MODELING}
    write_tree(tmp_path / "tree", {name: fill(text) for name, text in files.items()})
    outcome = check_paths([tmp_path / "tree"], source="transformers-5.23")
    assert [change.path.name for change in outcome.changes] == ["configuration_other.py"]
    held = [found for found in outcome.findings if found.finding.code == "MIG204"]
    assert {found.path.name for found in held} == {"configuration_toy.py"}
    assert "modeling_toy.py:" in held[0].finding.message
    assert "rowwise from moe_tp_down_rowwise" in held[0].finding.message


@pytest.mark.parametrize(("name", "is_held"), [("colwise_rep", True), ("colwise", False)])
def test_a_translation_holds_only_the_names_that_it_changes(tmp_path, name, is_held):
    read = f'def f(model):\n    return [key for key, style in model._tp_plan.items() if style == "{name}"]\n'
    plan = 'class ToyForCausalLM(PreTrainedModel):\n    _tp_plan = {"lm_head": "colwise_rep"}\n'
    head = "    def __init__(self):\n        self.lm_head = nn.Linear(2, 2)\n"
    write_tree(tmp_path / "tree", {"models/toy/modeling_toy.py": MODELING + plan + head, "apply.py": read})
    outcome = plan_rewrites([tmp_path / "tree"], target="transformers-5.23", source="transformers-4.57")
    assert outcome.errors == ()
    assert bool(outcome.changes) != is_held
    assert codes(outcome) == (["MIG204"] if is_held else [])


GETTERS = {
    "a style": "def style_of(self, key):\n    return self.$PLAN[key]\n",
    "get": "def get(self, key):\n    return self.$PLAN.get(key)\n",
    "a plan": "def entries(self):\n    return dict(self.$PLAN)\n",
    "a property": "@property\ndef entries(self):\n    return {key: style for key, style in self.$PLAN.items()}\n",
    "a generator": "def styles(self):\n    yield from self.$PLAN.values()\n",
    "an attribute": "def __init__(self):\n    self.entries_by_key = self.$PLAN.copy()\n",
    "a constant": "STYLES = list($PLAN.values())\n",
}
CALLERS = {
    "a style": [
        'def f(config):\n    return config.style_of("down") == "rowwise"\n',
        "def f(config):\n    style = config.style_of('down')\n    return TABLE[style]\n",
        'def f(config):\n    read = config.style_of\n    return read("down").startswith("row")\n',
        "def f(config):\n    return [place(style) for style in map(config.style_of, config.keys)]\n",
        'def f(config):\n    return getattr(config, "style_of")("down") == "rowwise"\n',
    ],
    "get": ['def f(config):\n    return config.get("down") == "rowwise"\n'],
    "a plan": ['def f(config):\n    return [k for k, v in config.entries().items() if v == "packed_colwise"]\n'],
    "a property": ['def f(config):\n    return config.entries["down"] in ("rowwise", "rowwise_allreduce")\n'],
    "a generator": ["def f(config):\n    return [TABLE[style] for style in config.styles()]\n"],
    "an attribute": ['def f(config):\n    return config.entries_by_key.get("down") == "rowwise"\n'],
    "a constant": [
        "from models.toy.configuration_toy import ToyConfig\ndef f():\n    return 'rowwise' in ToyConfig.STYLES\n",
    ],
}
PLAIN_MODEL = {"models/other/modeling_other.py": MODELING}


def run_callers(root, getter, files):
    text = CONFIG + WHOLE + textwrap.indent(getter, "    ")
    other = (CONFIG + WHOLE).replace("Toy", "Other")
    files = {TOY: text, "models/toy/modeling_toy.py": MODELING, "models/other/configuration_other.py": other, **files}
    write_tree(root, {name: fill(content) for name, content in {**files, **PLAIN_MODEL}.items()})
    outcome = plan_rewrites([root], source="transformers-5.23")
    checked = check_paths([root], source="transformers-5.23")
    assert outcome.errors == checked.errors == ()
    assert [change.path.name for change in outcome.changes] == [change.path.name for change in checked.changes]
    messages = [found.finding.message for found in checked.findings if found.path.name == "configuration_toy.py"]
    return {change.path.parent.name for change in outcome.changes}, messages


STYLE_OF = GETTERS["a style"]
PASSED_ON = {
    "by a function": {
        "tools/kinds.py": "def kind_of(config):\n    return config.style_of('down')\n",
        "tools/apply.py": "from .kinds import kind_of as kind\ndef f(config):\n    return TABLE[kind(config)]\n",
    },
    "by an object": {
        "tools/kinds.py": "class Kinds:\n    def __init__(self, c):\n        self.down = c.style_of('down')\n",
        "tools/apply.py": 'from .kinds import Kinds\ndef f(config):\n    return Kinds(config).down == "rowwise"\n',
    },
    "to code that does not parse": {"tools/apply.py": "def f(config):\n    print config.style_of('down')\n"},
}
HARMLESS_CALLERS = {
    "a log": "def f(config):\n    print(config.style_of('down'))\n",
    "another name": 'def f(config):\n    return config.style_of("down") == "colwise"\n',
    "its own": "class Tokenizer:\n    def style_of(self, key):\n        return key\n"
    '    def f(self):\n        return self.style_of("down") == "rowwise"\n',
    "one of many of that name": "class Tokenizer:\n    def style_of(self, key):\n        return key\n"
    "def f(tokenizer):\n    return render(tokenizer.style_of('x'))\n",
}


@pytest.mark.parametrize("files", PASSED_ON.values(), ids=PASSED_ON)
def test_styles_that_functions_pass_on_hold_the_plan(tmp_path, files):
    changed, messages = run_callers(tmp_path, STYLE_OF, files)
    assert changed == {"other"}
    assert any("tools/apply.py:" in message for message in messages), messages


def test_styles_that_subclasses_inherit_a_function_for_hold_their_plan(tmp_path):
    base = "class Base(PreTrainedConfig):\n" + textwrap.indent(STYLE_OF, "    ")
    heir = "from ..base import Base\n" + (CONFIG + WHOLE).replace("(PreTrainedConfig)", "(Base)").replace("Toy", "Heir")
    files = {
        "models/base.py": base,
        "models/heir/configuration_heir.py": heir,
        "models/heir/modeling_heir.py": MODELING,
    }
    changed, _ = run_callers(tmp_path, "", {**files, "tools/apply.py": CALLERS["a style"][0]})
    assert changed == {"other", "toy"}


@pytest.mark.parametrize("method", ["__getitem__", "__call__"])
def test_styles_that_operators_give_hold_the_plan(tmp_path, method):
    changed, messages = run_callers(tmp_path, STYLE_OF.replace("style_of", method), {})
    assert changed == {"other"}
    assert any("hands styles to code" in message for message in messages), messages


@pytest.mark.parametrize("caller", HARMLESS_CALLERS.values(), ids=HARMLESS_CALLERS)
def test_other_functions_and_other_uses_of_a_style_hold_nothing(tmp_path, caller):
    assert run_callers(tmp_path, STYLE_OF, {"tools/apply.py": caller})[0] == {"other", "toy"}


def test_a_common_name_holds_only_where_a_style_is_named_or_the_class_is(tmp_path):
    getter, caller = GETTERS["get"], "def f(x):\n    return TABLE[x.get('y')]\n"
    assert run_callers(tmp_path / "far", getter, {"tools/apply.py": caller})[0] == {"other", "toy"}
    named = f"from models.toy.configuration_toy import ToyConfig\n{caller}"
    assert run_callers(tmp_path / "near", getter, {"tools/apply.py": named})[0] == {"other"}
    beside = {"tests/test_apply.py": CALLERS["get"][0]}
    assert run_callers(tmp_path / "test", getter, beside)[0] == {"other", "toy"}


def test_files_that_may_mean_something_else_by_a_name_are_not_parsed(tmp_path, monkeypatch):
    """What a file beside the class keeps under a common name, `self.model`, is no style wherever a model occurs."""
    parsed = []
    parse = style_callers.parse_statements
    monkeypatch.setattr(
        style_callers, "parse_statements", lambda source: parsed.append(source.path.name) or parse(source)
    )
    files = {f"tools/part{n}.py": f"def f{n}(x):\n    return TABLE[x.model]\n" for n in range(8)}
    files["models/toy/run.py"] = "class Run:\n    def __init__(self, config):\n        self.model = config.entries()\n"
    changed, _ = run_callers(tmp_path, GETTERS["a plan"], files)
    assert changed == {"other", "toy"}
    assert "run.py" in parsed
    assert not any(name.startswith("part") for name in parsed)


@pytest.mark.parametrize(("kind", "caller"), [(kind, text) for kind, texts in CALLERS.items() for text in texts])
def test_styles_that_another_file_gets_from_a_function_hold_the_plan(tmp_path, kind, caller):
    assert "_plan" not in caller
    changed, messages = run_callers(tmp_path, GETTERS[kind], {"tools/apply.py": caller})
    assert changed == {"other"}
    assert any("tools/apply.py:" in message for message in messages), messages
