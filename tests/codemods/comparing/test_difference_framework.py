"""Framework code that every model inherits is compared once; its comments, and models it did not change, not at all."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from codemods.comparing.difference import compare
from codemods.files.revisions import find_repository
from tests.codemods.helpers import write_tree
from tests.codemods.repositories import PACKAGE, commit, differences, edit, summarize

UTILS = f"{PACKAGE}/modeling_utils.py"
PARALLEL = f"{PACKAGE}/integrations/tensor_parallel.py"
FRAMEWORK = {
    UTILS: """
        from .integrations.tensor_parallel import check_plan, default_plan

        class PreTrainedModel:
            _tp_plan = None

            def post_init(self):
                self._tp_plan = self.config.base_model_tp_plan.copy()
                for name, module in self.named_children():
                    if plan := getattr(module, "_tp_plan", None):
                        self._tp_plan.update({f"{name}.{k}": v for k, v in plan.items()})
                self._tp_plan.update(default_plan())
                check_plan(self)

            def save(self, folder):
                return self.write(folder, 1)
    """,
    PARALLEL: """
        def default_plan():
            return {"norm": "colwise"}

        def check_plan(model):
            if not model._tp_plan:
                raise ValueError("no plan")
    """,
}
MODEL = """
from ...modeling_utils import PreTrainedModel
class {name}PreTrainedModel(PreTrainedModel):
    pass
class {name}Model({name}PreTrainedModel):
    _tp_plan = {{"lm_head": "colwise"}}
"""
NAMES = [f"toy{n}" for n in range(12)]


@pytest.fixture
def tree(root):
    models = {f"{PACKAGE}/models/{name}/modeling_{name}.py": MODEL.format(name=name.title()) for name in NAMES}
    write_tree(root, {**FRAMEWORK, **models})
    commit(root, "a framework")
    return root


def test_a_comment_in_framework_code_is_no_change(tree):
    for path in (UTILS, PARALLEL):
        (tree / path).write_text("# a comment\n\n" + (tree / path).read_text() + "\n# another one\n")
    repository = find_repository(tree)
    found = compare(repository.read_revision("HEAD"), repository.read_working_tree())
    assert (found.differences, found.files) == ((), 2)


def test_a_change_in_framework_code_is_reported_once(tree):
    edit(tree, UTILS, '"_tp_plan", None', '"_tp_plan", {}')
    assert {(one.variant.path.name, one.variant.class_name) for one in differences(tree)} == {
        ("modeling_utils.py", "PreTrainedModel")
    }


def test_framework_code_that_plans_do_not_depend_on_changes_nothing(tree):
    edit(tree, UTILS, "self.write(folder, 1)", "self.write(folder, 2)")
    edit(tree, PARALLEL, "no plan", "the plan is empty")
    assert differences(tree) == ()


def test_a_helper_of_framework_code_in_another_file_is_followed(tree):
    edit(tree, PARALLEL, '{"norm": "colwise"}', '{"norm": "rowwise"}')
    (found,) = differences(tree)
    assert (found.variant.path.name, found.kind) == ("modeling_utils.py", "unread")


def test_a_plan_in_the_body_of_a_framework_class_is_inherited(tree):
    edit(tree, UTILS, "_tp_plan = None", '_tp_plan = {"norm": "colwise"}')
    write_tree(tree, {f"{PACKAGE}/models/heir/modeling_heir.py": MODEL.format(name="Heir")})
    found = [one for one in differences(tree) if one.key == "norm"]
    assert {*NAMES, "heir", "transformers", "llama"} <= {one.model for one in found}
    assert not any(one.variant.class_name.endswith("Toy1Model") for one in found), "which has a plan of its own"
    assert {one.explained for one in found if one.model in NAMES} == {False}


def test_a_new_model_lists_its_own_entries(tree):
    write_tree(tree, {f"{PACKAGE}/models/new/modeling_new.py": MODEL.format(name="New")})
    assert summarize(differences(tree)) == [("new", "lm_head", "added", True)]


def test_framework_files_are_parsed_once_for_all_models(tree, monkeypatch):
    """Twelve models inherit from it: neither its parses nor the texts made of its nodes grow with their number."""
    parses: Counter[bytes] = Counter()
    parse = ast.parse

    def count(source, *args, **options):
        text = source if isinstance(source, bytes) else str(source).encode()
        parses[text] += b"class PreTrainedModel" in text
        return parse(source, *args, **options)

    edit(tree, UTILS, '"_tp_plan", None', '"_tp_plan", {}')
    monkeypatch.setattr(ast, "parse", count)
    differences(tree)
    assert len(+parses) == 2
    assert max(parses.values()) == 1


QUANTIZER = f"{PACKAGE}/quantizers/quantizer_toy.py"
EXPERTS = f"{PACKAGE}/integrations/experts.py"
QUANTIZING = {
    QUANTIZER: """
        class Quantizer:
            def update_tp_plan(self, config):
                from ..integrations.experts import ToyExperts

                styles = ToyExperts.styles.get(config.kind)
                config.base_model_tp_plan = {k: styles.get(v, v) for k, v in config.base_model_tp_plan.items()}
                return config
    """,
    EXPERTS: """
        from .more import MoreExperts

        NAMES = {"rowwise": "colwise"}

        class ToyExperts(MoreExperts):
            styles = {"toy": NAMES}

            def forward(self, x):
                return x + 1

        ToyExperts.styles["other"] = {"colwise": "rowwise"}
    """,
    f"{PACKAGE}/integrations/more.py": """
        class MoreExperts:
            styles = {"toy": {}}
            limit = 7
    """,
}


@pytest.fixture
def quantizing(tree):
    write_tree(tree, QUANTIZING)
    commit(tree, "a quantizer")
    return tree


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        (EXPERTS, "x + 1", "x + 2"),
        (f"{PACKAGE}/integrations/more.py", "7", "8"),
        (EXPERTS, "class ToyExperts", "\nclass ToyExperts"),
    ],
)
def test_other_attributes_of_a_class_than_the_one_that_is_read_change_nothing(quantizing, path, before, after):
    edit(quantizing, path, before, after)
    assert differences(quantizing) == ()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"rowwise": "colwise"', '"rowwise": "local_colwise"'),
        ('{"toy": NAMES}', "{}"),
        ('{"colwise": "rowwise"}', "{}"),
        ('ToyExperts.styles["other"] = {"colwise": "rowwise"}', "ToyExperts.styles.update(other={})"),
    ],
)
def test_an_attribute_of_a_class_that_is_read_is_followed(quantizing, before, after):
    edit(quantizing, EXPERTS, before, after)
    assert [(one.variant.path.name, one.kind) for one in differences(quantizing)] == [("quantizer_toy.py", "unread")]


@pytest.mark.parametrize("attribute", ["", "    @classmethod\n    def styles(cls):\n        return cls.limit\n"])
def test_an_inherited_or_computed_attribute_of_a_class_is_followed(quantizing, attribute):
    edit(quantizing, EXPERTS, '    styles = {"toy": NAMES}\n', attribute)
    commit(quantizing, "an attribute of a base")
    edit(
        quantizing,
        EXPERTS if attribute else f"{PACKAGE}/integrations/more.py",
        *(("limit", "bound") if attribute else ("{}", "None")),
    )
    assert [one.kind for one in differences(quantizing)] == ["unread"]


@pytest.mark.parametrize("old_name", [UTILS, f"{PACKAGE}/configuration_utils.py"])
def test_the_framework_is_known_under_other_names_of_its_files(tree, old_name):
    """A change of what its functions do to plans is the framework's, and not each model's."""
    new_name = old_name.replace("utils", "base")
    module, new_module = (name.rpartition("/")[2].removesuffix(".py") for name in (old_name, new_name))
    for path in tree.rglob("*.py"):
        path.write_text(path.read_text().replace(f"{module} import", f"{new_module} import"))
    edit(tree, UTILS, '"_tp_plan", None', '"_tp_plan", {}')
    (tree / old_name).rename(tree / new_name)
    assert {one.variant.path.name for one in differences(tree)} <= {"modeling_utils.py", "modeling_base.py"}
    commit(tree, "renamed")
    edited = (tree / UTILS) if (tree / UTILS).exists() else tree / new_name
    edit(tree, edited.relative_to(tree), '"_tp_plan", {}', '"_tp_plan", None')
    assert {one.variant.path for one in differences(tree)} == {edited.relative_to(tree)}


RENAMES = {
    "a walrus": [("if plan :=", "if found :="), ("in plan.items", "in found.items")],
    "loops": [("for name, module", "for prefix, part"), ('f"{name}.', 'f"{prefix}.'), ("(module,", "(part,")],
    "a comprehension": [("{k}", "{key}"), ("v for k, v", "value for key, value"), (": value for", ": value for")],
}


@pytest.mark.parametrize("name", RENAMES)
def test_local_variables_of_other_names_are_no_change(tree, name):
    for before, after in RENAMES[name]:
        edit(tree, UTILS, before, after)
    assert differences(tree) == ()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("if plan :=", "if check_plan :="),
        ("in plan.items", "in module.items"),
        ("named_children", "named_parameters"),
    ],
)
def test_other_variables_in_place_of_those_that_were_used_are_a_change(tree, before, after):
    edit(tree, UTILS, before, after)
    assert {one.variant.path.name for one in differences(tree)} == {"modeling_utils.py"}


LOADER = f"{PACKAGE}/loader.py"
LOADING = """
from .more import make_more, make_other

class Loader:
    def load(self, model, x):
        more = make_more(model)
        {before}
            active_tp_plan = getattr(model, "_tp_plan", None) if more else None
            {inside}
        config = Config(tp_plan=active_tp_plan)
        {after}
        return config
"""
MORE = "def make_more(model):\n    return 1\n\ndef make_other(model):\n    return 2\n"
LATER = "model = run(model, config, make_other(model))"


def write_loader(root, *, before="if x:", inside="pass", after="pass"):
    write_tree(root, {LOADER: LOADING.format(before=before, inside=inside, after=after), f"{PACKAGE}/more.py": MORE})
    commit(root, "a loader")


@pytest.mark.parametrize("parts", [{"after": LATER}, {"inside": LATER}, {"after": f"for x in x:\n            {LATER}"}])
def test_what_runs_later_in_a_function_of_the_framework_decides_nothing(tree, parts):
    write_loader(tree, **parts)
    edit(tree, f"{PACKAGE}/more.py", "return 2", "return 3")
    assert differences(tree) == ()


@pytest.mark.parametrize(
    "parts",
    [
        {"before": f"{LATER}\n        if x:"},
        {"before": f"try:\n            {LATER}\n        except KeyError:"},
        {"before": "for x in x:", "inside": LATER},
        {"before": "while x:", "inside": f"if x:\n                {LATER}"},
        {"before": "def inner(x=x):", "after": LATER},
    ],
)
def test_what_may_run_earlier_in_a_function_of_the_framework_counts(tree, parts):
    write_loader(tree, **parts)
    edit(tree, f"{PACKAGE}/more.py", "return 2", "return 3")
    assert {one.variant.path.name for one in differences(tree)} == {"loader.py"}
