"""Who owns a plan: parents found however they are imported, lost ones, and copies that lost their plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from codemods.checking.check import check_paths
from codemods.files.sources import SourceFile
from codemods.inheritance.ownership import PlanLocation, Tree
from codemods.reading.parse import read_module
from codemods.reading.skim import skim
from codemods.rewriting.migrate import plan_rewrites
from tests.codemods.helpers import PACKED, REGULAR, codes, generated, rewrite, write_tree

MODELING = (
    REGULAR
    + """
class ToyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.experts = ToyExperts(config)
        self.q_proj = nn.Linear(1, 1)


class ToyLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mlp = ToyBlock(config)
        self.self_attn = ToyBlock(config)


class ToyModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([ToyLayer(config) for _ in range(2)])
"""
)
COPY = PACKED.replace("Toy", "Bar")
WITHOUT = "class BarConfig(PreTrainedConfig):\n    model_type = 'bar'\n"
PLAIN = 'class ToyConfig:\n    base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise"}\n'


def tree(root, modular, copy=COPY, owner=PACKED):
    """A hand-written owner, and a model whose modular file inherits from it."""
    files = {
        "models/toy/configuration_toy.py": owner,
        "models/toy/modeling_toy.py": MODELING,
        "models/bar/modular_bar.py": modular,
        "models/bar/configuration_bar.py": generated("bar", copy),
        "models/bar/modeling_bar.py": MODELING,
    }
    return write_tree(root, files)


def inheriting(imports, base):
    return f"{imports}\n\n\nclass BarConfig({base}):\n    pass\n"


PARENT = inheriting("from ..toy.configuration_toy import ToyConfig", "ToyConfig")
IMPORTS = {
    "another name": inheriting("from ..toy.configuration_toy import ToyConfig\n\nBase = ToyConfig", "Base"),
    "the whole package": inheriting("from transformers import ToyConfig", "ToyConfig"),
    "above the models": inheriting("from ... import ToyConfig", "ToyConfig"),
    "alias": inheriting("from ..toy.configuration_toy import ToyConfig as Base", "Base"),
    "module": inheriting("from ..toy import configuration_toy as c", "c.ToyConfig"),
    "module under its own name": inheriting("from ..toy import configuration_toy", "configuration_toy.ToyConfig"),
    "package": inheriting("from .. import toy", "toy.configuration_toy.ToyConfig"),
    "absolute module": inheriting("import fork.models.toy.configuration_toy as c", "c.ToyConfig"),
    "absolute name": inheriting(
        "import fork.models.toy.configuration_toy", "fork.models.toy.configuration_toy.ToyConfig"
    ),
    "from above the models": inheriting("from ...models.toy.configuration_toy import ToyConfig", "ToyConfig"),
    "everything": inheriting("from ..toy.configuration_toy import *", "ToyConfig"),
    "in try": inheriting(
        "try:\n    from ..toy.configuration_toy import ToyConfig\nexcept ImportError:\n    from ..x import ToyConfig",
        "ToyConfig",
    ),
    "in if": inheriting(
        "if TYPE_CHECKING:\n    from ..toy.configuration_toy import ToyConfig\nelse:\n    ToyConfig = object",
        "ToyConfig",
    ),
    "module in try": inheriting(
        "try:\n    import fork.models.toy.configuration_toy as c\nfinally:\n    pass", "c.ToyConfig"
    ),
}


@pytest.mark.parametrize("modular", IMPORTS.values(), ids=IMPORTS)
def test_a_parent_is_found_however_it_is_imported(tmp_path, modular):
    outcome = rewrite(tree(tmp_path, modular))
    assert [(change.path.name, change.role) for change in outcome.changes] == [
        ("configuration_toy.py", "owner"),
        ("configuration_bar.py", "copy"),
    ]
    assert codes(outcome) == []


def test_a_class_inside_of_another_is_found(tmp_path):
    owner = "class Outer:\n" + "".join(f"    {line}\n" for line in PACKED.strip().splitlines())
    modular = inheriting("from ..toy.configuration_toy import Outer", "Outer.ToyConfig")
    outcome = rewrite(tree(tmp_path, modular, owner=owner))
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py", "configuration_bar.py"]


def test_a_class_that_another_file_passes_on_is_found(tmp_path):
    tree(tmp_path, inheriting("from ..between.configuration_between import Base", "Base"))
    between = "from ..toy.configuration_toy import ToyConfig as Base\n"
    outcome = rewrite(write_tree(tmp_path, {"models/between/configuration_between.py": between}))
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py", "configuration_bar.py"]


@pytest.mark.parametrize(
    "text",
    [
        *IMPORTS.values(),
        "from ..a import (  # why\n    B as C,\n    D,\n)\n",
        "import os; from ..a import B\n",
        "if x: from ..a import B\n",
        "def f():\n    from ..a import B\n",
        "class A:\n    from ..a import B\n",
        "try:\n\tfrom . import B\nexcept ImportError:\n\tpass\n",
        "import a.models.b as c, d.models.e as f\n",
        "from.a import B\n",
        "import torch.nn as nn\nimport a.models.b\n",
        "with x:\n    from a.models.b import C\n",
    ],
)
def test_imports_are_read_alike_with_and_without_a_parser(text):
    source = SourceFile(Path("x.py"), (text + PACKED).encode())
    read, skimmed = read_module(source), skim(source)
    assert "ToyConfig" in read.classes
    assert skimmed is None or dict(skimmed.imports) == dict(read.imports)


LOST = {
    "a file that is gone": inheriting("from ..gone.configuration_gone import ToyConfig", "ToyConfig"),
    "a class that is gone": inheriting("from ..toy.configuration_toy import GoneConfig", "GoneConfig"),
    "a computed base": inheriting("from ..toy.configuration_toy import make", "make()"),
    "no class at all": "from ..toy.configuration_toy import ToyConfig\n",
}


@pytest.mark.parametrize("modular", LOST.values(), ids=LOST)
def test_an_owner_never_changes_while_a_copy_may_stay_behind(tmp_path, modular):
    outcome = rewrite(tree(tmp_path, modular))
    assert outcome.changes == ()
    findings = {found.path.name: found.finding for found in outcome.findings}
    assert findings["configuration_bar.py"].code in {"MIG302", "MIG303"}
    assert findings["configuration_toy.py"].code == "MIG306"
    assert "bar/configuration_bar.py" in findings["configuration_toy.py"].message


def test_only_owners_that_say_the_same_are_held_back(tmp_path):
    other = PACKED.replace("Toy", "Other").replace("layers", "blocks")
    tree(tmp_path, LOST["a file that is gone"])
    files = {
        "models/other/configuration_other.py": other,
        "models/other/modeling_other.py": MODELING.replace("layers", "blocks"),
    }
    outcome = rewrite(write_tree(tmp_path, files))
    assert [change.path.name for change in outcome.changes] == ["configuration_other.py"]


def test_an_owner_is_held_back_too_where_the_way_to_it_does_not_parse(tmp_path):
    outcome = rewrite(tree(tmp_path, "from ..toy.configuration_toy import ToyConfig\n\n\nclass BarConfig(\n"))
    assert outcome.changes == ()
    assert codes(outcome) == ["MIG306"]
    assert ["modular_bar.py" in error.message for error in outcome.errors] == [True]


NOTHING_LEADS_THERE = {
    "a cycle": inheriting("from .configuration_bar import BarConfig", "BarConfig"),
    "an unknown base": "class BarConfig(Unknown):\n    pass\n",
    "another model": inheriting("from ..gone.configuration_gone import GoneConfig", "GoneConfig"),
    "another class": "class Other:\n    pass\n",
    "no class": "class BarConfig(\n",
}


@pytest.mark.parametrize("modular", NOTHING_LEADS_THERE.values(), ids=NOTHING_LEADS_THERE)
def test_one_lost_copy_holds_no_owner_that_nothing_of_it_names(tmp_path, modular):
    outcome = rewrite(tree(tmp_path, modular))
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]
    assert set(codes(outcome)) <= {"MIG302", "MIG303"}
    assert len(codes(outcome)) + len(outcome.errors) == 1


@pytest.mark.parametrize("check", [plan_rewrites, check_paths])
def test_a_modular_file_that_leads_nowhere_must_parse(tmp_path, check):
    outcome = check([tree(tmp_path, "class BarConfig(Unknown):\n    def broken(:\n")])
    assert ["modular_bar.py:2: does not parse" in error.message for error in outcome.errors] == [True]
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]


def test_so_must_one_whose_generated_file_lost_its_plan(tmp_path):
    outcome = check_paths([tree(tmp_path, PARENT.replace("pass", "def broken(:"), WITHOUT)])
    assert ["modular_bar.py" in error.message for error in outcome.errors] == [True]
    assert outcome.changes == ()


def test_a_name_on_the_way_is_enough_to_hold_an_owner(tmp_path):
    tree(tmp_path, inheriting("from ..mid.configuration_gone import MidConfig", "MidConfig"))
    mid = PARENT.replace("class Bar", "class Mid")
    outcome = rewrite(write_tree(tmp_path, {"models/mid/modular_mid.py": mid}))
    assert outcome.changes == ()
    assert sorted(codes(outcome)) == ["MIG302", "MIG306"]


LACKING = {
    "no plan": WITHOUT,
    "None": WITHOUT + "    base_model_tp_plan = None\n",
    "another plan": WITHOUT + '    base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise"}\n',
}


@pytest.mark.parametrize("modular", [PARENT, IMPORTS["alias"], IMPORTS["module"]], ids=["name", "alias", "module"])
@pytest.mark.parametrize("copy", LACKING.values(), ids=LACKING)
def test_a_generated_file_that_lost_its_plan_is_at_odds_with_its_owner(tmp_path, copy, modular):
    tree(tmp_path, modular, copy)
    outcome = check_paths([tmp_path])
    assert outcome.changes == ()
    assert [(found.path.name, found.finding.code) for found in outcome.findings] == [("configuration_bar.py", "MIG301")]
    assert codes(rewrite(tmp_path)) == ["MIG301"]


@pytest.mark.parametrize("copy", [WITHOUT, WITHOUT + "    base_model_tp_plan = None\n"])
def test_so_is_one_whose_plan_no_rewrite_speaks_of(tmp_path, copy):
    tree(tmp_path, PARENT, copy, PLAIN)
    (found,) = check_paths([tmp_path]).findings
    assert (found.path.name, found.line, found.finding.code) == (
        "configuration_bar.py",
        2 + ("None" in copy) * 2,
        "MIG301",
    )
    assert plan_rewrites([tmp_path]).findings == ()


def test_so_is_one_below_another_that_lost_its_plan(tmp_path):
    tree(tmp_path, PARENT, WITHOUT)
    below = PARENT.replace("toy", "bar").replace("Toy", "Bar").replace("class Bar", "class Low")
    files = {
        "models/low/modular_low.py": below,
        "models/low/configuration_low.py": generated("low", WITHOUT.replace("Bar", "Low")),
    }
    outcome = check_paths([write_tree(tmp_path, files)])
    assert sorted(found.path.name for found in outcome.findings) == ["configuration_bar.py", "configuration_low.py"]
    assert set(codes(outcome)) == {"MIG301"}


def test_a_modular_files_own_plan_belongs_in_its_generated_file(tmp_path):
    tree(tmp_path, COPY, WITHOUT)
    assert [(found.path.name, found.finding.code) for found in rewrite(tmp_path).findings] == [
        ("configuration_bar.py", "MIG301")
    ]
    assert "packed_colwise" in (tmp_path / "models/bar/modular_bar.py").read_text()


@pytest.mark.parametrize("removed", ["None", "AttributeError()"])
def test_a_plan_that_the_modular_file_takes_away_is_not_missing(tmp_path, removed):
    modular = PARENT.replace("pass", f"base_model_tp_plan = {removed}")
    tree(tmp_path, modular, WITHOUT)
    assert codes(check_paths([tmp_path])) == []
    assert len(rewrite(tmp_path).changes) == 1


def test_a_generated_class_may_inherit_its_plan(tmp_path):
    heir = "\n\nclass HeirConfig(BarConfig):\n    pass\n"
    tree(tmp_path, PARENT + heir, COPY + heir)
    assert codes(check_paths([tmp_path])) == []
    assert len(rewrite(tmp_path).changes) == 2


def test_the_library_around_the_models_owns_nothing(tmp_path):
    """Its base classes say `None` for plans that a class's other bases have."""
    library = "class Base:\n    base_model_tp_plan = None\n"
    modular = inheriting(
        "from ...library import Base\nfrom ..toy.configuration_toy import ToyConfig", "Base, ToyConfig"
    )
    outcome = rewrite(write_tree(tree(tmp_path / "fork", modular), {"library.py": library}))
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py", "configuration_bar.py"]


def test_a_generated_file_that_does_not_parse_hides_no_other(tmp_path):
    tree(tmp_path, PARENT, "class BarConfig(\n    base_model_tp_plan\n")
    files = {
        "models/low/modular_low.py": PARENT.replace("Bar", "Low"),
        "models/low/configuration_low.py": generated("low", WITHOUT.replace("Bar", "Low")),
    }
    outcome = check_paths([write_tree(tmp_path, files)])
    assert [(found.path.name, found.finding.code) for found in outcome.findings] == [("configuration_low.py", "MIG301")]
    assert ["configuration_bar.py" in error.message for error in outcome.errors] == [True]


def test_a_class_that_two_configurations_define_is_not_looked_for_by_its_name(tmp_path):
    tree(tmp_path, inheriting("from transformers import ToyConfig", "ToyConfig"))
    outcome = rewrite(write_tree(tmp_path, {"models/other/configuration_other.py": "class ToyConfig:\n    pass\n"}))
    assert outcome.changes == ()
    assert sorted(codes(outcome)) == ["MIG302", "MIG306"]


@pytest.mark.parametrize("before", ["", "import os\n"], ids=["first line", "below"])
def test_a_name_that_stands_for_itself_leads_nowhere(tmp_path, before):
    outcome = rewrite(tree(tmp_path, f"{before}A = B\nB = A\n\n\nclass BarConfig(A):\n    pass\n"))
    assert codes(outcome) == ["MIG302"]


INTERLEAVED = MODELING.replace(".chunk(2, dim=-1)", "[..., ::2], 1")
UNCLEAR = MODELING.replace(".chunk(2, dim=-1)", ".view(-1, 2)")
USERS = {
    "inherits": PARENT,
    "inherits by another name": IMPORTS["another name"],
    "inherits by alias": IMPORTS["alias"],
    "inherits, generated": generated("bar", PARENT),
    "takes it in": PARENT.replace("(ToyConfig)", "").replace(
        "pass", "base_model_tp_plan = {**ToyConfig.base_model_tp_plan}"
    ),
    "takes it in by alias": IMPORTS["alias"]
    .replace("(Base)", "")
    .replace("pass", "base_model_tp_plan = Base.base_model_tp_plan"),
}


def used(root, user, modeling, owner=PACKED):
    files = {
        "models/toy/configuration_toy.py": owner,
        "models/toy/modeling_toy.py": MODELING,
        "models/bar/configuration_bar.py": user,
        "models/bar/modular_bar.py": PARENT,
    }
    return write_tree(root, files if modeling is None else files | {"models/bar/modeling_bar.py": modeling})


@pytest.mark.parametrize("user", USERS.values(), ids=USERS)
def test_a_model_that_uses_a_plan_without_a_copy_of_it_must_have_the_layout_too(tmp_path, user):
    outcome = rewrite(used(tmp_path / "interleaved", user, INTERLEAVED))
    assert outcome.changes == ()
    (found,) = [one.finding for one in outcome.findings if one.path.name == "configuration_toy.py"]
    assert (found.code, "modeling_bar.py:ToyExperts" in found.message) == ("MIG102", True)
    outcome = rewrite(used(tmp_path / "unclear", user, UNCLEAR))
    assert outcome.changes == ()
    (found,) = [one.finding for one in outcome.findings if one.path.name == "configuration_toy.py"]
    assert (found.code, found.message.endswith("models/bar, which uses it")) == ("MIG203", True)


@pytest.mark.parametrize("modeling", [MODELING, None], ids=["regular", "its parent's"])
def test_a_plan_is_rewritten_where_they_all_have_it(tmp_path, modeling):
    outcome = rewrite(used(tmp_path, PARENT, modeling))
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]


def test_a_model_that_takes_in_a_constant_must_have_the_layout_too(tmp_path):
    head, _, plan = PACKED.strip().partition("base_model_tp_plan = ")
    owner = f"PLAN = {plan}\n\n\n{head}base_model_tp_plan = PLAN\n"
    user = inheriting("from ..toy.configuration_toy import PLAN", "Config").replace("pass", "base_model_tp_plan = PLAN")
    outcome = rewrite(used(tmp_path, user, INTERLEAVED, owner))
    assert outcome.changes == ()
    findings = {found.path.name: found.finding.code for found in outcome.findings}
    assert findings["configuration_toy.py"] == "MIG102"


OTHERS = {
    "a plan of its own": COPY.replace("layers", "blocks"),
    "none": inheriting("from ..toy.configuration_toy import ToyConfig", "ToyConfig").replace(
        "pass", "base_model_tp_plan = None"
    ),
    "a class of the same name": "class ToyConfig:\n    pass\n\n\nclass BarConfig(ToyConfig):\n    pass\n",
    "only mentioned": "# ToyConfig.base_model_tp_plan\nclass BarConfig:\n    pass\n",
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_model_without_the_plan_has_no_say(tmp_path, other):
    outcome = rewrite(used(tmp_path, other, INTERLEAVED))
    assert "configuration_toy.py" in [change.path.name for change in outcome.changes]


def test_an_heir_of_an_heir_speaks_too(tmp_path):
    used(tmp_path, PARENT, None)
    below = PARENT.replace("toy", "bar").replace("Toy", "Bar").replace("class Bar", "class Low")
    files = {"models/low/configuration_low.py": below, "models/low/modeling_low.py": INTERLEAVED}
    outcome = rewrite(write_tree(tmp_path, files))
    assert (outcome.changes, codes(outcome)) == ((), ["MIG102"])


HOOK = PACKED.replace("moe_tp_experts", "moe_experts_allreduce")
HOOK = "".join(line for line in HOOK.splitlines(keepends=True) if "_proj" not in line)
PAIR = '{"layers.*.mlp.experts.gate_up_proj": "packed_colwise", "layers.*.mlp.experts.down_proj": "rowwise"}'
KID_CODE = {
    "adds": (HOOK, f"self.base_model_tp_plan.update({PAIR})"),
    "takes out": (PACKED, 'self.base_model_tp_plan.pop("layers.*.mlp.experts.down_proj")'),
}


@pytest.mark.parametrize(("plan", "code"), KID_CODE.values(), ids=KID_CODE)
def test_code_of_a_child_that_decides_otherwise_is_named_and_nothing_is_at_odds(tmp_path, plan, code):
    method = f"    def __init__(self):\n        {code}\n"
    tree(tmp_path, PARENT.replace("    pass\n", method), plan.replace("Toy", "Bar") + "\n" + method, plan)
    outcome = check_paths([tmp_path])
    assert outcome.changes == ()
    findings = [one.finding for one in outcome.findings if one.path.name == "configuration_toy.py"]
    assert {finding.code for finding in findings} == {"MIG204"}
    assert all("models/bar/modular_bar.py" in finding.message for finding in findings)
    assert not {"MIG301", "MIG502"} & set(codes(outcome))


LENGTH = 600


def test_a_chain_of_copies_is_searched_once_and_at_any_depth(tmp_path, monkeypatch):
    """Each file is searched once, whatever the number of those that are generated from its heirs."""
    files = {"models/m0/configuration_m0.py": "class M0(Base):\n" + PLAIN.partition("\n")[2]}
    for n in range(1, LENGTH):
        parent = f"from ..m{n - 1}.configuration_m{n - 1} import M{n - 1}\n"
        files |= {
            f"models/m{n}/modular_m{n}.py": f"{parent}class M{n}(M{n - 1}):\n    pass\n",
            f"models/m{n}/configuration_m{n}.py": generated(f"m{n}", files["models/m0/configuration_m0.py"]).replace(
                "class M0(", f"class M{n}("
            ),
        }
    write_tree(tmp_path, files)
    searched: list[PlanLocation] = []
    search_class = Tree._search_class

    def count(self, location, wanted):
        searched.append(location)
        return search_class(self, location, wanted)

    monkeypatch.setattr(Tree, "_search_class", count)
    tree = Tree()
    for n in reversed(range(LENGTH)):
        path = tmp_path / f"models/m{n}/configuration_m{n}.py"
        owner = tree.find_owner(PlanLocation(path, f"M{n}", "base_model_tp_plan"))
        assert owner == PlanLocation(tmp_path / "models/m0/configuration_m0.py", "M0", "base_model_tp_plan")
    assert len(searched) == len(set(searched)) == 2 * LENGTH - 1


def test_a_chain_of_heirs_is_looked_up_once_and_at_any_depth(tmp_path, monkeypatch):
    heirs = "".join(f"class C{n}(C{n - 1}): pass\n" for n in range(1, 1500))
    path = write_tree(tmp_path, {"configuration_toy.py": PLAIN.replace("ToyConfig", "C0") + heirs})
    path /= "configuration_toy.py"
    asked: list[str] = []
    find_bases = Tree.find_bases

    def count(self, path, class_name):
        asked.append(class_name)
        return find_bases(self, path, class_name)

    monkeypatch.setattr(Tree, "find_bases", count)
    tree = Tree()
    for n in reversed(range(1500)):
        definition = tree.find_definition(PlanLocation(path, f"C{n}", "base_model_tp_plan"))
        assert definition == PlanLocation(path, "C0", "base_model_tp_plan")
    assert len(asked) == len(set(asked)) == 1499
    assert len(tree.mro(path, "C1499")) == 1500
