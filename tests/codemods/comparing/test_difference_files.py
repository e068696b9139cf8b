"""Plans in any Python file are compared: whoever writes them, and however other files lead to them."""

from __future__ import annotations

import pytest

from codemods.comparing.difference import compare
from codemods.files.revisions import find_repository
from tests.codemods.helpers import HEADER, write_tree
from tests.codemods.repositories import PACKAGE, commit, differences, edit, summarize

TOY = f"{PACKAGE}/models/toy"
PLAN = '    base_model_tp_plan = {"norm": "colwise"}\n'
CLASS = f"class ToyConfig:\n{PLAN}"
HEIR = "class HeirConfig(ToyConfig):\n    pass\n"


def write(root, files):
    write_tree(root, files)
    commit(root, "written")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (f"{TOY}/configs.py", CLASS),
        (f"{TOY}/__init__.py", CLASS),
        ("configs.py", CLASS),
        ("tests/test_toy.py", CLASS),
        ("tests/test_toy.py", 'def test_toy():\n    load(tp_plan={"norm": "colwise"})\n'),
        ("examples/serve.py", 'model = load(tp_plan={"norm": "colwise"})\n'),
        ("examples/serve.py", 'model._tp_plan = {"norm": "colwise"}\n'),
        ("examples/serve.py", 'model.tp_plan = {"norm": "colwise"}\n'),
        ("examples/serve.py", 'load().tp_plan["norm"] = "colwise"\n'),
        (
            f"{PACKAGE}/quantizers/quantizer_toy.py",
            "class Quantizer:\n    def update_tp_plan(self, config):\n"
            '        config.base_model_tp_plan = {"norm": "colwise"}\n        return config\n',
        ),
        (f"{TOY}/modular_toy.py", CLASS),
    ],
)
def test_a_plan_in_any_file_is_compared(root, path, text):
    write(root, {path: text})
    edit(root, path, "colwise", "rowwise")
    (found,) = differences(root)
    assert (found.key, found.kind, found.explained) == ("norm", "placement", True)
    assert str(found.variant.path) == path


@pytest.mark.parametrize("asked", ['"auto"', "None"])
def test_asking_for_the_plan_of_the_model_is_no_plan(root, asked):
    write(root, {"tests/test_toy.py": f"def test_toy():\n    load(tp_plan={asked})\n"})
    edit(root, "tests/test_toy.py", "load(", "load(1, ")
    assert differences(root) == ()


@pytest.mark.parametrize("path", [".hidden/configs.py", "node_modules/configs.py", "configs.txt"])
def test_what_check_does_not_read_is_not_compared(root, path):
    write(root, {path: CLASS})
    edit(root, path, "colwise", "rowwise")
    assert differences(root) == ()


REEXPORTS = {
    "a configuration": (
        {f"{TOY}/configs.py": CLASS, f"{TOY}/configuration_toy.py": "from .configs import ToyConfig\n"},
        "from ..toy.configuration_toy import ToyConfig\n",
    ),
    "a configuration, under another name": (
        {f"{TOY}/configs.py": CLASS, f"{TOY}/configuration_toy.py": "from .configs import ToyConfig as Toy\n"},
        "from ..toy.configuration_toy import Toy as ToyConfig\n",
    ),
    "two files": (
        {
            f"{TOY}/plans.py": CLASS,
            f"{TOY}/configs.py": "from .plans import *\n",
            f"{TOY}/configuration_toy.py": "from .configs import ToyConfig\n",
        },
        "from ..toy import ToyConfig\n",
    ),
    "a package": (
        {f"{TOY}/configs.py": CLASS, f"{TOY}/__init__.py": "from .configs import ToyConfig\n"},
        "from ..toy import ToyConfig\n",
    ),
    "a package of a package": (
        {f"{TOY}/configs/one.py": CLASS, f"{TOY}/configs/__init__.py": "from . import one\n"},
        "from ..toy.configs import one\nToyConfig = one.ToyConfig\n",
    ),
    "try": (
        {f"{TOY}/configs.py": CLASS},
        "try:\n    from ..toy.configs import ToyConfig\nexcept ImportError:\n    ToyConfig = object\n",
    ),
    "try with an absolute name": (
        {f"{TOY}/configs.py": CLASS},
        "try:\n    from transformers.models.toy.configs import ToyConfig\nexcept ImportError:\n    ToyConfig = None\n",
    ),
    "a function": (
        {f"{TOY}/configs.py": CLASS},
        "import sys\nif sys.version_info:\n    from ..toy.configs import ToyConfig\n",
    ),
}


@pytest.mark.parametrize(("files", "imports"), REEXPORTS.values(), ids=REEXPORTS)
def test_heirs_are_found_behind_re_exports(root, files, imports):
    write(root, {**files, f"{PACKAGE}/models/heir/configs.py": f"{imports}{HEIR}"})
    edit(root, next(iter(files)), "colwise", "rowwise")
    assert [one[2:] for one in summarize(differences(root))] == [("placement", False), ("placement", True)]


def test_each_arm_of_a_try_is_inherited(root):
    files = {
        f"{TOY}/fast.py": CLASS,
        f"{TOY}/slow.py": CLASS,
        f"{TOY}/configuration_toy.py": (
            "try:\n    from .fast import ToyConfig\nexcept ImportError:\n    from .slow import ToyConfig\n\n\n" + HEIR
        ),
    }
    write(root, files)
    for name in ("fast", "slow"):
        edit(root, f"{TOY}/{name}.py", "colwise", "rowwise")
        heir, own = differences(root)
        assert (heir.variant.class_name, heir.kind, heir.explained) == ("HeirConfig", "placement", False)
        assert (own.variant.class_name, own.kind, own.explained) == ("ToyConfig", "placement", True)
        edit(root, f"{TOY}/{name}.py", "rowwise", "colwise")


def test_a_constant_of_either_arm_is_none_for_sure(root):
    text = "try:\n    from .fast import PLAN\nexcept ImportError:\n    from .slow import PLAN\n\n\n"
    files = {
        f"{TOY}/fast.py": 'PLAN = {"norm": "colwise"}\n',
        f"{TOY}/slow.py": 'PLAN = {"norm": "colwise"}\n',
        f"{TOY}/configs.py": f"{text}class ToyConfig:\n    base_model_tp_plan = PLAN\n",
    }
    write(root, files)
    for name in ("fast", "slow"):
        edit(root, f"{TOY}/{name}.py", "colwise", "rowwise")
        assert [one[2:] for one in summarize(differences(root))] == [("unread", False)]
        edit(root, f"{TOY}/{name}.py", "rowwise", "colwise")


def test_what_a_helper_of_a_helper_makes_may_have_changed(root):
    files = {
        f"{TOY}/configs.py": "from .make import make\nclass ToyConfig:\n    base_model_tp_plan = make()\n",
        f"{TOY}/make.py": "from .more import more\ndef make():\n    return more()\n",
        f"{TOY}/more.py": 'def more():\n    return {"norm": "colwise"}\n',
    }
    write(root, files)
    (root / f"{TOY}/more.py").write_text("# a comment\n" + files[f"{TOY}/more.py"])
    assert differences(root) == ()
    edit(root, f"{TOY}/more.py", "colwise", "rowwise")
    assert [one[2:] for one in summarize(differences(root))] == [("unread", False)]


def test_a_modular_file_is_compared_unless_its_generated_file_changed_with_it(root):
    files = {f"{TOY}/modular_toy.py": CLASS, f"{TOY}/configuration_toy.py": HEADER.format(name="toy") + CLASS}
    write(root, files)
    edit(root, f"{TOY}/modular_toy.py", "colwise", "rowwise")
    assert [one.variant.path.name for one in differences(root)] == ["modular_toy.py"]
    edit(root, f"{TOY}/configuration_toy.py", "colwise", "rowwise")
    assert [one.variant.path.name for one in differences(root)] == ["configuration_toy.py"]


def test_a_template_that_is_no_python_is_named_and_stops_nothing(root):
    write(root, {"template.py": f"{{{{ name }}}}\n{CLASS}", f"{TOY}/configs.py": CLASS})
    edit(root, "template.py", "{{ name }}", "{{ model }} (")
    edit(root, f"{TOY}/configs.py", "colwise", "rowwise")
    repository = find_repository(root)
    found = compare(repository.read_revision("HEAD"), repository.read_working_tree())
    assert [one.key for one in found.differences] == ["norm"]
    assert ["template.py" in error.message for error in found.errors] == [True]


ROUTER = """
class ToyRouter(nn.Module):
    def __init__(self, config):
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
class ToyScale(nn.Module):
    def __init__(self, config):
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
class ToyModel(nn.Module):
    def __init__(self, config):
        self.gate = ToyRouter(config)
        self.experts = nn.ModuleList([ToyRouter(config)])
        self.scale = ToyScale(config)
"""


@pytest.mark.parametrize(
    ("key", "placements"),
    [
        ("gate", ("Shard(0)", "Shard(1)")),
        ("gate.weight", ("Shard(0)", "Shard(1)")),
        ("scale", ("Shard(0)", "Shard(0)")),
    ],
)
def test_a_module_with_a_bare_weight_is_placed_by_the_weight(root, key, placements):
    text = CLASS.replace("norm", key)
    write(root, {f"{TOY}/configuration_toy.py": text, f"{TOY}/modeling_toy.py": ROUTER})
    edit(root, f"{TOY}/configuration_toy.py", "colwise", "rowwise")
    (found,) = differences(root)
    assert (found.before.effect.placement, found.after.effect.placement) == placements
    assert found.kind == ("placement" if len(set(placements)) > 1 else "meaning")


COUNTING = """
class Model:
    _tp_plan = {{"lm_head": "colwise"}}


def count(model, on):
    plan = {value}
    {use}
"""


@pytest.mark.parametrize(
    "value", ["model._tp_plan if on else []", "model._tp_plan if on else None", "() or model._tp_plan"]
)
@pytest.mark.parametrize(
    "use", ["return len(plan)", "return [key for key in plan]", "return plan is not None and 'lm_head' in plan"]
)
def test_code_that_reads_the_keys_of_a_plan_is_no_plan(root, value, use):
    write(root, {"toy.py": COUNTING.format(value="model._tp_plan", use=use)})
    edit(root, "toy.py", "plan = model._tp_plan", f"plan = {value}")
    assert differences(root) == ()


@pytest.mark.parametrize("use", ["plan['lm_head'] = 'rowwise'", "return register(plan)", "model.head_plan = plan"])
def test_code_that_may_change_a_plan_is_one(root, use):
    write(root, {"toy.py": COUNTING.format(value="model._tp_plan", use=use)})
    edit(root, "toy.py", "plan = model._tp_plan", "plan = other(model)._tp_plan if on else []")
    assert differences(root) != ()


READS = [
    'plan = getattr(model, "_tp_plan", {})',
    'plan = getattr(model, "_tp_plan", None) or {}',
    'plan = inspect.getattr_static(model, "_tp_plan", dict())',
    'plan = getattr(model, "_tp_plan", EMPTY)',
    'plan = getattr(model, "_tp_plan", getattr(model, "tp_plan", {}))',
    'plan = vars(model).get("_tp_plan", {})',
    'plan = model.__dict__.setdefault("_tp_plan", {})',
    "plan = {**(model._tp_plan or {})}",
    "plan = model.config.base_model_tp_plan or {}",
    'plan = model.config.to_dict().get("base_model_tp_plan", {})',
    'show(plan := getattr(model, "_tp_plan", {}))',
    'plan = {}\n{indent}if hasattr(model, "_tp_plan"):\n{indent}    plan = model._tp_plan',
    "plan = {k: v for k, v in model._tp_plan.items() if k}",
]
USES = ["return plan", "return [show(style) for style in plan.values()]", 'return show(plan.get("lm_head"))']


@pytest.mark.parametrize("folder", [f"{PACKAGE}/models/toy", PACKAGE])
@pytest.mark.parametrize("local", ["tp_plan", "found"])
def test_another_way_to_read_a_plan_is_no_change(root, folder, local):
    """Each in a function and a method, of a model and of the framework, under a plan's name and another."""

    def build(reads):
        functions = (
            "".join(
                f"{indent}def read_{number}_{use}(model, tp_plan={{}}):\n"
                f"{indent}    {read.replace('{indent}', f'{indent}    ')}\n{indent}    {USES[use]}\n"
                for indent in ("    ", "")
                for number, read in enumerate(reads)
                for use in range(len(USES))
            )
            .replace("plan =", f"{local} =")
            .replace("plan :=", f"{local} :=")
        )
        functions = functions.replace("return plan", f"return {local}").replace("plan.", f"{local}.")
        return f'EMPTY = {{}}\nclass Model:\n    _tp_plan = {{"lm_head": "colwise"}}\n{functions}'

    write_tree(root, {f"{folder}/modeling_utils.py": build(["plan = model._tp_plan"] * len(READS))})
    commit(root, "reads")
    write_tree(root, {f"{folder}/modeling_utils.py": build(READS)})
    assert differences(root) == ()


def test_an_empty_plan_for_none_is_no_removal(root):
    """A default that has entries gives them to the plan, and takes none away."""
    before = """
    class Model:
        _tp_plan = {"lm_head": "colwise"}

        @property
        def tp_plan(self):
            return self._tp_plan

        def fill(self):
            self.use(self._tp_plan)
    """
    write(root, {"toy.py": before})
    edit(
        root,
        "toy.py",
        "return self._tp_plan",
        "if not self._tp_plan:\n            return {}\n        return self._tp_plan",
    )
    edit(root, "toy.py", "self.use", "if self._tp_plan is None:\n            self._tp_plan = {}\n        self.use")
    assert differences(root) == ()
    edit(root, "toy.py", "self.use(self._tp_plan)", 'self.use(getattr(self, "_tp_plan", {"norm": "colwise"}))')
    assert [(one.key, one.kind) for one in differences(root)] == [("norm", "added")]
    edit(root, "toy.py", "if self._tp_plan is None", "if self.config.base_model_tp_plan is None")
    assert {(one.key, one.kind) for one in differences(root)} == {("*", "removed"), ("norm", "added")}
