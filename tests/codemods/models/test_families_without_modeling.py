"""Families with a configuration only: `auto/modeling_auto.py` says which family's modeling source runs them."""

from __future__ import annotations

import pytest

from codemods.models.describe import describe
from codemods.models.model_files import find_modeling_files
from tests.codemods.helpers import PACKED, codes, generated, rewrite, write_tree
from tests.codemods.models.test_experts import TRANSPOSED, model

AUTO = """
MODEL_MAPPING_NAMES = OrderedDict(
    [
        ("toy", "ToyModel"),
        ("new", "{base}"),
    ]
)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict(
    [
        ("new", "{head}"),
    ]
)
"""
HEAD = """

class ToyForCausalLM(PreTrainedModel):
    def __init__(self, config):
        self.model = ToyModel(config)
"""
TOY = model("self.experts = ToyExperts(config)") + HEAD
ODD = model("self.experts = ToyExperts(config)", experts=TRANSPOSED).replace("Toy", "Odd") + HEAD.replace("Toy", "Odd")
NEW = PACKED.replace("ToyConfig", "NewConfig").replace("base_model_tp", 'model_type = "new"\n    base_model_tp')
MODULAR = 'from ..toy.configuration_toy import ToyConfig\n\n\nclass NewConfig(ToyConfig):\n    model_type = "new"\n'


def family(root, auto=AUTO, base="ToyModel", head="ToyForCausalLM", **files):
    """`toy`, which is hand-written, `odd` with transposed experts, and `new`, a copy of `toy` with no modeling file."""
    texts = {
        "toy/configuration_toy.py": PACKED.replace("base_model_tp", 'model_type = "toy"\n    base_model_tp'),
        "toy/modeling_toy.py": TOY,
        "odd/modeling_odd.py": ODD,
        "new/modular_new.py": MODULAR,
        "new/configuration_new.py": generated("new", NEW),
        "auto/modeling_auto.py": auto.replace("{base}", base).replace("{head}", head),
    }
    return write_tree(root, texts | {name.replace("__", "/") + ".py": text for name, text in files.items()})


def test_the_class_that_the_model_type_is_mapped_to_decides(tmp_path):
    root = family(tmp_path)
    outcome = rewrite(root)
    assert outcome.findings == ()
    assert {change.path.name for change in outcome.changes} == {"configuration_new.py", "configuration_toy.py"}
    assert describe(root / "new", "layers.*.mlp.experts").where == "modeling_toy.py:ToyExperts"


OTHERS = {
    "of a dict": 'NAMES = {"toy": "ToyModel", "new": "ToyModel"}\n',
    "one of several classes": 'NAMES = OrderedDict([("toy", "ToyModel"), ("new", ("ToyModel", "ToyForCausalLM"))])\n',
    "on lines of its own": (
        'NAMES = OrderedDict(\n    [\n        (\n            "new",\n            "ToyModel",\n        ),\n    ]\n)\n'
    ),
    "only the head": 'NAMES = OrderedDict([("new", "ToyForCausalLM")])\n',
    "updated later": 'NAMES = OrderedDict([])\nNAMES.update({"new": "ToyModel"})\n',
}


@pytest.mark.parametrize("auto", OTHERS.values(), ids=OTHERS)
def test_other_ways_to_map_it(tmp_path, auto):
    root = family(tmp_path, auto)
    assert find_modeling_files(root / "new") == (root / "toy/modeling_toy.py",)
    assert len(rewrite(root).changes) == 2


def test_a_class_of_a_family_with_another_name_is_found(tmp_path):
    root = family(tmp_path, 'NAMES = OrderedDict([("new", "ToyModel")])\n')
    (root / "toy").rename(root / "renamed")
    write_tree(root, {"new/modular_new.py": MODULAR.replace("..toy.", "..renamed.")})
    assert find_modeling_files(root / "new") == (root / "renamed/modeling_toy.py",)


UNMAPPED = {
    "no mapping": "NAMES = OrderedDict([])\n",
    "a class that no file defines": 'NAMES = OrderedDict([("new", "LostModel")])\n',
    "one of two that none defines": 'NAMES = OrderedDict([("new", "ToyModel"), ("new", "LostModel")])\n',
    "a comment": '# ("new", "ToyModel"),\nNAMES = OrderedDict([("toy", "ToyModel")])  # "new": "ToyModel"\n',
    "a name for the type": 'NEW = "new"\nNAMES = OrderedDict([("toy", "ToyModel"), (NEW, "ToyModel")])\n',
    "another type": 'NAMES = OrderedDict([("new_text", "ToyModel")])\n',
}


@pytest.mark.parametrize("auto", UNMAPPED.values(), ids=UNMAPPED)
def test_a_copy_without_known_source_holds_its_owner_and_is_named(tmp_path, auto):
    outcome = rewrite(family(tmp_path, auto))
    assert outcome.changes == ()
    (found,) = outcome.findings
    assert (found.path.name, found.finding.code) == ("configuration_toy.py", "MIG203")
    assert "no modeling file is beside it" in found.finding.message
    assert found.finding.message.endswith("/new, which uses it")


@pytest.mark.parametrize(("base", "head"), [("OddModel", "OddForCausalLM"), ("ToyModel", "OddForCausalLM")])
def test_a_copy_that_other_source_runs_holds_its_owner(tmp_path, base, head):
    outcome = rewrite(family(tmp_path, base=base, head=head))
    assert outcome.changes == ()
    (found,) = outcome.findings
    assert found.path.name == "configuration_toy.py"
    assert "OddExperts" in found.finding.message


def test_a_copy_whose_own_source_is_unknown_is_named_with_its_line(tmp_path):
    fast = model("self.experts = FastExperts(config)", imports="from fast_moe import FastExperts\n").replace(
        "Toy", "New"
    )
    outcome = rewrite(family(tmp_path, new__modeling_new=fast))
    (found,) = outcome.findings
    assert "modeling_new.py:21 takes `FastExperts`, which comes from `fast_moe`" in found.finding.message
    assert found.finding.message.endswith("/new, which uses it")


@pytest.mark.parametrize(("base", "changed"), [("ToyModel", 1), ("OddModel", 0)])
def test_a_configuration_that_only_inherits_counts_by_what_runs_it(tmp_path, base, changed):
    root = family(tmp_path, base=base, head=base.replace("Model", "ForCausalLM"))
    (root / "new/modular_new.py").unlink()
    write_tree(root, {"new/configuration_new.py": MODULAR})
    outcome = rewrite(root)
    assert len(outcome.changes) == changed
    assert codes(outcome) == ([] if changed else ["MIG101"])


def test_a_plan_of_ones_own_is_judged_by_the_mapped_source(tmp_path):
    root = family(tmp_path, base="OddModel", head="OddForCausalLM")
    (root / "new/modular_new.py").unlink()
    write_tree(root, {"new/configuration_new.py": NEW})
    outcome = rewrite(root)
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]
    assert codes(outcome) == ["MIG101"]
