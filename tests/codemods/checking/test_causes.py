"""Each cause has its own words and next step: half pairs, styles that exist, parents by full names, tests."""

from __future__ import annotations

import pytest

from codemods.checking.check import check_paths
from codemods.rewriting.migrate import plan_rewrites
from tests.codemods.checking.test_check import DENSE
from tests.codemods.helpers import PACKED, REGULAR, codes, generated, write_tree

TOY = {"toy/configuration_toy.py": PACKED, "toy/modeling_toy.py": REGULAR + DENSE}
DOWN, GATE_UP = '"layers.*.mlp.experts.down_proj"', '"layers.*.mlp.experts.gate_up_proj"'


def heir(body, base="ToyConfig", imports="from ..toy.configuration_toy import ToyConfig"):
    text = f"{imports}\n\n\nclass HeirConfig({base}):\n{body}\n"
    return {"heir/configuration_heir.py": text, "heir/modeling_heir.py": (REGULAR + DENSE).replace("Toy", "Heir")}


def in_init(statement):
    return f"    def __init__(self):\n        super().__init__()\n        {statement}"


def find(outcome, name):
    return [found.finding for found in outcome.findings if found.path.name == name]


ONE_KEY = [
    f"self.base_model_tp_plan.update({{{DOWN}: 'rowwise'}})",
    f"self.base_model_tp_plan[{GATE_UP}] = 'packed_colwise'",
    f"self.base_model_tp_plan |= {{{DOWN}: 'rowwise'}}",
    f"self.base_model_tp_plan.setdefault({DOWN}, 'rowwise')",
    f"self.base_model_tp_plan = {{**self.base_model_tp_plan, {DOWN}: 'rowwise'}}",
]


@pytest.mark.parametrize("statement", ONE_KEY)
def test_a_one_key_update_of_an_inherited_plan_is_no_half_pair(tmp_path, statement):
    root = write_tree(tmp_path, TOY | heir(in_init(statement)))
    for outcome in (plan_rewrites([root]), check_paths([root], source="transformers-5.23")):
        assert outcome.changes == ()
        (finding,) = find(outcome, "configuration_heir.py")
        assert finding.code == "MIG204"
        assert "elsewhere" in finding.message


@pytest.mark.parametrize("statement", ONE_KEY)
def test_a_one_key_update_of_a_plan_that_is_not_in_the_tree_is_no_half_pair(tmp_path, statement):
    files = heir(in_init(statement), "MixtralConfig", "from transformers import MixtralConfig")
    for outcome in (plan_rewrites([write_tree(tmp_path, files)]), check_paths([tmp_path], source="transformers-5.23")):
        (finding,) = find(outcome, "configuration_heir.py")
        assert finding.code == "MIG204"
        assert finding.message.endswith(("is not read", "which decide on its counterpart"))


def test_free_code_that_updates_some_configuration_is_no_half_pair(tmp_path):
    text = f"def patch(config):\n    config.base_model_tp_plan.update({{{DOWN}: 'rowwise'}})\n"
    write_tree(tmp_path, {"toy/patch.py": text, "toy/modeling_toy.py": REGULAR})
    assert codes(check_paths([tmp_path], source="transformers-5.23")) == ["MIG204"]


@pytest.mark.parametrize(
    "text",
    [
        PACKED.replace(f'        {DOWN}: "rowwise",\n', ""),
        f"class ToyConfig:\n    base_model_tp_plan = {{}}\n{in_init(ONE_KEY[0])}\n",
        f"class ToyConfig:\n{in_init(f'self.base_model_tp_plan = {{{DOWN}: 0}}'.replace('0', repr('rowwise')))}\n",
    ],
)
def test_a_pair_that_is_really_half_is_still_one(tmp_path, text):
    write_tree(tmp_path, TOY | {"toy/configuration_toy.py": text})
    assert codes(check_paths([tmp_path], source="transformers-5.23")) == ["MIG202"]


def test_an_inherited_plan_without_experts_leaves_a_pair_half(tmp_path):
    dense = 'class ToyConfig:\n    base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise"}\n'
    write_tree(tmp_path, TOY | {"toy/configuration_toy.py": dense} | heir(in_init(ONE_KEY[0])))
    assert codes(check_paths([tmp_path], source="transformers-5.23")) == ["MIG202"]


@pytest.mark.parametrize(
    ("gate_up", "down", "code", "words"),
    [
        ("grouped_gemm", "grouped_gemm", "MIG106", "divides no expert"),
        ("replicate", "replicate", "MIG106", "divides no expert"),
        ("grouped_gemm", "rowwise", "MIG208", "it is Shard(0), but rowwise on down_proj is"),
        ("local_rowwise", "local_rowwise", "MIG208", "it is Shard(2) of `[experts, 2 * intermediate, hidden]`"),
        ("local_packed_rowwise", "local_colwise", "MIG208", "it is Packed(2, 2)"),
        ("packed_rowwise", "rowwise", "MIG208", "it is Packed(2, 2)"),
        ("rowwise", "rowwise", "MIG208", "Shard(2)"),
        ("gather", "rowwise", "MIG208", "a style of modules"),
        ("packed_colwse", "rowwise", "MIG205", "no known dialect has a style of this name"),
    ],
)
def test_styles_that_exist_are_not_called_misspelled(tmp_path, gate_up, down, code, words):
    text = PACKED.replace("packed_colwise", gate_up).replace('"rowwise"', f'"{down}"')
    outcome = plan_rewrites([write_tree(tmp_path, TOY | {"toy/configuration_toy.py": text})])
    assert outcome.changes == ()
    (found,) = outcome.findings
    assert found.finding.code == code
    assert words in found.finding.message
    assert ("correct the name" in found.finding.hint) is (code == "MIG205")


COPY = generated("heir", PACKED.replace("ToyConfig", "HeirConfig"))


@pytest.mark.parametrize(
    ("imports", "base"),
    [
        ("from mylib.toy.configuration_toy import ToyConfig", "ToyConfig"),
        ("from mylib.toy import ToyConfig", "ToyConfig"),
        ("from mylib import ToyConfig", "ToyConfig"),
        ("from src.mylib.toy.configuration_toy import ToyConfig as Base", "Base"),
        ("import mylib.toy.configuration_toy as toy", "toy.ToyConfig"),
        ("import mylib.toy.configuration_toy", "mylib.toy.configuration_toy.ToyConfig"),
        ("from mylib.toy import configuration_toy", "configuration_toy.ToyConfig"),
        ("from mylib.configs import ToyConfig", "ToyConfig"),
        ("from elsewhere.mylib.toy.configuration_toy import ToyConfig", "ToyConfig"),
    ],
)
def test_parents_are_found_under_their_full_names(tmp_path, imports, base):
    files = {
        **TOY,
        "toy/__init__.py": "from .configuration_toy import *\n",
        "configs.py": "from mylib.toy.configuration_toy import ToyConfig\n",
        "heir/modular_heir.py": f"{imports}\n\n\nclass HeirConfig({base}):\n    pass\n",
        "heir/configuration_heir.py": COPY,
        "heir/modeling_heir.py": (REGULAR + DENSE).replace("Toy", "Heir"),
    }
    place = "elsewhere/mylib" if "elsewhere" in imports else "src/mylib"
    root = write_tree(tmp_path, {f"{place}/{name}": text for name, text in files.items()})
    outcome = check_paths([root], source="transformers-5.23")
    assert codes(outcome) == []
    assert [change.role for change in outcome.changes] == ["owner", "copy"]


def test_a_parent_in_another_package_of_the_tree_is_found(tmp_path):
    files = {f"one/mylib/{name}": text for name, text in TOY.items()}
    files["two/ours/heir/modular_heir.py"] = (
        "from mylib.toy.configuration_toy import ToyConfig\n\n\nclass HeirConfig(ToyConfig):\n    pass\n"
    )
    files["two/ours/heir/configuration_heir.py"] = COPY
    files["two/ours/heir/modeling_heir.py"] = (REGULAR + DENSE).replace("Toy", "Heir")
    outcome = check_paths([write_tree(tmp_path, files)], source="transformers-5.23")
    assert codes(outcome) == []
    assert len(outcome.changes) == 2


def test_a_parent_that_two_packages_may_be_is_not_guessed(tmp_path):
    files = {f"{place}/mylib/{name}": text for name, text in TOY.items() for place in ("one", "two")}
    files["ours/heir/modular_heir.py"] = (
        "from mylib.toy.configuration_toy import ToyConfig\n\n\nclass HeirConfig(ToyConfig):\n    pass\n"
    )
    files["ours/heir/configuration_heir.py"] = COPY
    assert "MIG302" in codes(check_paths([write_tree(tmp_path, files)], source="transformers-5.23"))


MADE_UP = """
class MadeUpConfig:
    base_model_tp_plan = {"a": "klingon", "a": "b", "layers.0.mlp.experts": "moe_tp_experts"}


def test_it(self):
    load(tp_plan={"layers.*.mlp.experts.gate_up_proj": "packed_colwise", "layers.*.mlp.experts.down_proj": "rowwise"})
"""


@pytest.mark.parametrize(
    "name", ["tests/models/x.py", "pkg/test_plans.py", "pkg/plans_test.py", "conftest.py", "test/x.py"]
)
def test_plans_of_tests_are_not_judged(tmp_path, name):
    root = write_tree(tmp_path, {name: MADE_UP, "pyproject.toml": ""})
    outcome = check_paths([root], source="transformers-5.23")
    assert {found.finding.severity for found in outcome.findings} <= {"note"}
    assert {found.finding.code for found in outcome.findings} == {"MIG107"}
    assert "MIG203 elsewhere" in outcome.findings[0].finding.message


@pytest.mark.parametrize("name", ["tests/toy/configuration_toy.py", "tests/toy/test_toy.py"])
def test_plans_of_tests_are_rewritten(tmp_path, name):
    root = write_tree(tmp_path, {name: PACKED, "tests/toy/modeling_toy.py": REGULAR + DENSE, "pyproject.toml": ""})
    assert [change.path.name for change in plan_rewrites([root]).changes] == [name.rpartition("/")[2]]


@pytest.mark.parametrize("name", ["pkg/x.py", "contest/x.py", "pkg/latest.py", "attest/configuration_test.py"])
def test_other_files_are_judged(tmp_path, name):
    root = write_tree(tmp_path / "tests/checkout", {name: MADE_UP, "pyproject.toml": ""})
    assert {"MIG501", "MIG203"} <= set(codes(check_paths([root], source="transformers-5.23")))


LISTED = """
class GroupedExperts(nn.Module):
    def __init__(self, config):
        self.w1 = nn.Parameter(torch.empty(config.n, config.i, config.h))
        self.w2 = nn.Parameter(torch.empty(config.n, config.h, config.i))
class ToyMLP(nn.Module):
    def __init__(self, config):
        self.experts = GroupedExperts(config)
class ToyLayer(nn.Module):
    def __init__(self, config):
        self.mlp = ToyMLP(config)
class ToyModel(nn.Module):
    def __init__(self, config):
        self.layers = nn.ModuleList([ToyLayer(config) for _ in range(config.n)])
"""


@pytest.mark.parametrize("name", ["experts", "expert"])
def test_a_key_that_nothing_creates_is_said_once(tmp_path, name):
    """That its experts have no such parameter, and therefore no layout either, is one cause."""
    files = {"toy/configuration_toy.py": PACKED, "toy/modeling_toy.py": LISTED.replace("self.experts", f"self.{name}")}
    outcome = check_paths([write_tree(tmp_path, files)], source="transformers-5.23")
    found = [(one.finding.code, one.finding.key) for one in outcome.findings]
    assert len({key for _, key in found}) == len(found) > 1
    codes_by_key = {key.rpartition(".")[2]: code for code, key in found}
    assert codes_by_key.pop("gate_up_proj") == "MIG203"
    assert set(codes_by_key.values()) == {"MIG506"}
