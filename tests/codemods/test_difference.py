"""Two revisions of real model folders in a real git repository, compared by what their plans do."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codemods.comparing.difference import compare
from codemods.files.revisions import changed_paths, find_repository
from codemods.files.touched import touched_lines
from codemods.inheritance.effective import UNREAD
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes
from plans.errors import SourceError, UsageError
from tests.codemods.helpers import write_tree

MODELS = ("mixtral", "qwen3_moe", "mellum", "gemma4", "llama4", "llama")
PACKAGE = "src/transformers"
MIXTRAL = f"{PACKAGE}/models/mixtral/configuration_mixtral.py"
CHILD = f"{PACKAGE}/models/offspring/configuration_offspring.py"
OFFSPRING = """
from ..mixtral.configuration_mixtral import MixtralConfig


class OffspringConfig(MixtralConfig):
    model_type = "offspring"
"""


def git(folder, *arguments):
    author = ["-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "core.autocrlf=false"]
    return subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True).stdout.decode()


def commit(folder, message):
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A repository with a few of transformers' model folders and a class that only inherits from one of them."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parent
    root = tmp_path_factory.mktemp("repository")
    for name in MODELS:
        shutil.copytree(
            installed / "models" / name, root / PACKAGE / "models" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(installed / "configuration_utils.py", root / PACKAGE)
    (root / PACKAGE / "__init__.py").write_text('__version__ = "5.23.0"\n')
    (root / CHILD).parent.mkdir()
    (root / CHILD).write_text(OFFSPRING)
    modeling = (root / PACKAGE / "models/mixtral/modeling_mixtral.py").read_text()
    (root / CHILD).with_name("modeling_offspring.py").write_text(modeling.replace("MixtralConfig", "OffspringConfig"))
    git(root, "init", "-q")
    commit(root, "as installed")
    return root


@pytest.fixture
def root(template, tmp_path):
    return Path(shutil.copytree(template, tmp_path / "repository"))


def edit(root, name, before, after):
    text = (root / name).read_text()
    assert before in text
    (root / name).write_text(text.replace(before, after))


def differences(root, base="HEAD", head=None):
    repository = find_repository(root)
    after = repository.revision(head) if head else repository.working_tree()
    found = compare(repository.revision(base), after)
    assert found.errors == ()
    return found.differences


def told(found):
    return [(one.model, one.key, one.kind, one.explained) for one in found]


def test_a_rewrite_only_renames(root):
    assert write_changes(plan_rewrites([root]).changes).errors == ()
    found = differences(root)
    assert {one.model for one in found} == {"mixtral", "qwen3_moe", "mellum", "gemma4", "offspring"}
    assert {one.kind for one in found} == {"renamed"}
    assert len(found) == 10
    assert {one.after.reading.placement for one in found} == {"Packed(1, 2)", "Shard(2)"}
    assert {one.model for one in found if not one.explained} == {"offspring"}, "it inherits, and renames are harmless"
    commit(root, "rewritten")
    assert differences(root, "HEAD~1", "HEAD") == found, "the working tree and its commit are compared alike"
    assert differences(root, "HEAD", "HEAD") == ()


def test_a_placement_that_a_class_inherits_is_not_explained(root):
    edit(root, MIXTRAL, '"layers.*.self_attn.q_proj": "colwise"', '"layers.*.self_attn.q_proj": "rowwise"')
    found = differences(root)
    assert told(found) == [
        ("mixtral", "layers.*.self_attn.q_proj", "placement", True),
        ("offspring", "layers.*.self_attn.q_proj", "placement", False),
    ]
    assert [(one.before.reading.placement, one.after.reading.placement) for one in found] == [
        ("Shard(0)", "Shard(1)")
    ] * 2
    assert {str(one.side.path) for one in found} == {MIXTRAL}, "where the inherited entry is written"


def test_other_communication_is_no_rename(root):
    edit(
        root, MIXTRAL, '"layers.*.self_attn.q_proj": "colwise"', '"layers.*.self_attn.q_proj": "colwise_gather_output"'
    )
    assert told(differences(root)) == [
        ("mixtral", "layers.*.self_attn.q_proj", "meaning", True),
        ("offspring", "layers.*.self_attn.q_proj", "meaning", False),
    ]


def test_entries_added_and_removed(root):
    edit(root, MIXTRAL, '"layers.*.self_attn.q_proj": "colwise",', '"layers.*.self_attn.new": "colwise",')
    assert told(differences(root)) == [
        ("mixtral", "layers.*.self_attn.q_proj", "removed", True),
        ("mixtral", "layers.*.self_attn.new", "added", True),
        ("offspring", "layers.*.self_attn.q_proj", "removed", False),
        ("offspring", "layers.*.self_attn.new", "added", False),
    ]


def test_a_plan_that_is_dropped_for_the_inherited_one(root):
    """What vanishes is explained by its own lines; what comes in from the parent is not."""
    plan = '    base_model_tp_plan = {"layers.*.self_attn.q_proj": "rowwise"}\n'
    (root / CHILD).write_text(OFFSPRING + plan)
    commit(root, "own plan")
    (root / CHILD).write_text(OFFSPRING)
    found = {one.key: (one.kind, one.explained) for one in differences(root)}
    assert found["layers.*.self_attn.q_proj"] == ("placement", True)
    assert found["layers.*.mlp.experts"] == ("added", False)


def test_another_attribute_with_the_same_lines_is_not_explained(root):
    """The entries' own lines are untouched: only the name above them changed."""
    edit(root, MIXTRAL, "base_model_tp_plan", "base_model_sp_plan")
    found = differences(root)
    assert {(one.kind, one.explained) for one in found} == {("removed", False), ("added", False)}


def test_new_and_deleted_models_explain_themselves(root):
    folder = (root / CHILD).parent
    shutil.rmtree(folder)
    assert {(one.model, one.kind, one.explained) for one in differences(root)} == {("offspring", "removed", True)}
    commit(root, "gone")
    folder.mkdir()
    (root / CHILD).write_text(OFFSPRING)
    found = differences(root)
    assert {(one.model, one.kind, one.explained) for one in found} == {("offspring", "added", True)}, (
        "untracked files count"
    )


def test_a_new_release_changes_what_the_same_lines_mean(root):
    modeling = "class ToyModel(nn.Module):\n    def __init__(self, config):\n        self.embed = nn.Embedding(8, 4)\n"
    plan = '    base_model_tp_plan = {"embed": "colwise", "layers.*.self_attn.q_proj": "colwise"}\n'
    files = {"configuration_toy.py": f"class ToyConfig:\n{plan}", "modeling_toy.py": modeling}
    write_tree(root / PACKAGE / "models/toy", files)
    edit(root, f"{PACKAGE}/__init__.py", "5.23.0", "5.20.0")
    commit(root, "older")
    edit(root, f"{PACKAGE}/__init__.py", "5.20.0", "5.23.0")
    repository = find_repository(root)
    found = compare(repository.revision("HEAD"), repository.working_tree())
    assert found.dialects == ("transformers-5.19", "transformers-5.23")
    assert told(found.differences) == [("toy", "embed", "placement", False)]
    (embed,) = found.differences
    assert (embed.before.reading.placement, embed.after.reading.placement) == ("Shard(1)", "Shard(0)")


def test_the_same_entry_on_another_parameter_is_not_explained(root):
    """Nobody touched the plan, but what its key names is no longer what it was."""
    name = f"{PACKAGE}/models/mixtral/modeling_mixtral.py"
    edit(
        root,
        name,
        "        self.down_proj = nn.Parameter(torch.empty(",
        "        self.other = nn.Parameter(torch.empty(",
    )
    edit(root, name, "        self.other", "        self.down_proj = nn.Linear(1, 1)\n        self.other")
    assert [(one.place.plan, one.side.style, *told([one])[0][1:]) for one in differences(root)] == [
        ("base_model_ep_plan", "grouped_gemm", "layers.*.mlp.experts.down_proj", "meaning", False),
        ("base_model_tp_plan", "rowwise", "layers.*.mlp.experts.down_proj", "placement", False),
    ]


Q_PROJ = "layers.*.self_attn.q_proj"
ADDED = "\n    def __post_init__(self, **kwargs):\n        {}\n        super().__post_init__(**kwargs)\n"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (f'self.base_model_tp_plan.pop("{Q_PROJ}")', Q_PROJ),
        (f'del self.base_model_tp_plan["{Q_PROJ}"]', Q_PROJ),
        ("self.base_model_tp_plan.clear()", "*"),
        ("self.base_model_tp_plan = None", "*"),
    ],
)
def test_entries_that_code_takes_out(root, line, key):
    """Whoever inherits the code loses the entry too, and no line of theirs says so."""
    edit(root, MIXTRAL, '__all__ = ["MixtralConfig"]', ADDED.format(line) + '\n\n__all__ = ["MixtralConfig"]')
    found = differences(root)
    assert told(found) == [("mixtral", key, "removed", True), ("offspring", key, "removed", False)]
    assert {one.place.plan for one in found} == {"base_model_tp_plan in __post_init__"}
    assert {one.after.reading.placement for one in found} == {"whole"}
    commit(root, "taken out")
    edit(root, MIXTRAL, line, "pass")
    assert told(differences(root)) == [("mixtral", key, "added", True), ("offspring", key, "added", False)]


def test_a_plan_that_code_replaces(root):
    line = f'self.base_model_tp_plan = {{"{Q_PROJ}": "rowwise"}}'
    edit(root, MIXTRAL, '__all__ = ["MixtralConfig"]', ADDED.format(line) + '\n\n__all__ = ["MixtralConfig"]')
    assert told(differences(root)) == [
        ("mixtral", "*", "removed", True),
        ("mixtral", Q_PROJ, "added", True),
        ("offspring", "*", "removed", False),
        ("offspring", Q_PROJ, "added", False),
    ]


def test_one_arm_of_a_conditional_expression(root):
    line = f'self.base_model_tp_plan |= {{"{Q_PROJ}": "colwise"}} if self.fused else {{"{Q_PROJ}": "rowwise"}}'
    edit(root, MIXTRAL, '__all__ = ["MixtralConfig"]', ADDED.format(line) + '\n\n__all__ = ["MixtralConfig"]')
    commit(root, "two arms")
    edit(root, MIXTRAL, f'else {{"{Q_PROJ}": "rowwise"}}', f'else {{"{Q_PROJ}": "colwise"}}')
    found = differences(root)
    assert told(found) == [("mixtral", Q_PROJ, "placement", True), ("offspring", Q_PROJ, "placement", False)]
    assert {one.place.plan for one in found} == {"base_model_tp_plan in __post_init__ if not (self.fused)"}


def test_a_plan_kept_in_a_constant(root):
    text = (root / MIXTRAL).read_text()
    plan = text[text.index("    base_model_tp_plan = {") :].partition("}\n")[0] + "}\n"
    constant = "_PLAN = " + plan.strip().partition(" = ")[2] + "\n\n\n"
    kept = text.replace(plan, "    base_model_tp_plan = _PLAN\n")
    start = kept.index("class MixtralConfig")
    start = kept.rindex("\n\n", 0, start)
    (root / MIXTRAL).write_text(f"{kept[:start]}\n\n{constant.strip()}\n{kept[start:]}")
    commit(root, "a constant")
    assert differences(root, "HEAD~1", "HEAD") == (), "the same entries, elsewhere in the file"
    edit(root, MIXTRAL, f'"{Q_PROJ}": "colwise"', f'"{Q_PROJ}": "rowwise"')
    assert told(differences(root)) == [
        ("mixtral", Q_PROJ, "placement", True),
        ("offspring", Q_PROJ, "placement", False),
    ]


GATE_UP, DOWN = "layers.*.mlp.experts.gate_up_proj", "layers.*.mlp.experts.down_proj"
FORWARD = "gate, up = nn.functional.linear(current_state, self.gate_up_proj[expert_idx]).chunk(2, dim=-1)"
LAYOUTS = {
    "interleaved": (
        [(FORWARD, FORWARD.replace("gate, up =", "both =").replace(".chunk(2, dim=-1)", "[..., ::2], 1"))],
        {GATE_UP: "Packed(1, 2) of interleaved experts"},
    ),
    "transposed": (
        [("@use_experts_implementation\n", "@use_experts_implementation(is_transposed=True)\n")],
        {GATE_UP: "Packed(1, 2) of transposed experts", DOWN: "Shard(2) of transposed experts"},
    ),
    "biased": (
        [("        self.act_fn", "        self.down_proj_bias = nn.Parameter(torch.empty(1, 1))\n        self.act_fn")],
        {GATE_UP: "Packed(1, 2) of biased experts", DOWN: "Shard(2) of biased experts"},
    ),
}


@pytest.mark.parametrize(("edits", "expected"), LAYOUTS.values(), ids=LAYOUTS)
def test_another_layout_under_the_same_style_is_another_placement(root, edits, expected):
    for before, after in edits:
        edit(root, f"{PACKAGE}/models/mixtral/modeling_mixtral.py", before, after)
    found = [one for one in differences(root) if one.place.plan == "base_model_tp_plan"]
    assert {one.key: one.after.reading.placement for one in found} == expected
    assert {(one.model, one.kind, one.explained) for one in found} == {("mixtral", "placement", False)}


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
    assert [(one.place.class_name, *told([one])[0]) for one in found] == [
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
    assert told(differences(root)) == [("kid", "norm", "placement", False)]


def test_a_constant_that_one_helper_passes_on(root):
    text = "from ..plans import BASE\nclass A:\n    base_model_tp_plan = BASE\n"
    kid(root, text, plans="from .more import BASE\n", more=NORM)
    edit(root, f"{PACKAGE}/models/more.py", "colwise", "rowwise")
    assert told(differences(root)) == [("kid", "norm", "placement", False)]


def test_another_class_s_plan_taken_over_without_inheriting(root):
    text = (
        "from ..mixtral.configuration_mixtral import MixtralConfig\n"
        "class KidConfig:\n    base_model_tp_plan = {**MixtralConfig.base_model_tp_plan}\n"
    )
    kid(root, text)
    edit(root, MIXTRAL, f'"{Q_PROJ}": "colwise"', f'"{Q_PROJ}": "rowwise"')
    assert ("kid", Q_PROJ, "placement", False) in told(differences(root))


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
    assert told(differences(root)) == [("kid", UNREAD, "unread", False)]


def test_what_a_helper_in_another_file_makes_may_have_changed(root):
    text = "from ..plans import make\nclass A:\n    base_model_tp_plan = make(1)\n"
    kid(root, text, plans='def make(n):\n    return {f"layers.{n}": "colwise"}\n')
    edit(root, PLANS, "colwise", "rowwise")
    assert told(differences(root)) == [("kid", UNREAD, "unread", False)]


def test_a_computed_style_may_have_changed(root):
    kid(root, 'class A:\n    base_model_tp_plan = {"norm": pick(1), "other": pick(3)}\n')
    edit(root, KID, "pick(1)", "pick(2)")
    assert told(differences(root)) == [("kid", "norm", "unread", False)]


def test_a_plan_that_cannot_be_read_any_more_has_lost_nothing_for_sure(root):
    kid(root, 'class A:\n    base_model_tp_plan = {"norm": "colwise"}\n')
    edit(root, KID, '{"norm": "colwise"}', "make()")
    assert told(differences(root)) == [("kid", UNREAD, "unread", False)]


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
    assert told([found]) == [("kid", "norm", "condition", True)]
    assert found.moved_from is not None
    assert found.moved_from.plan != found.place.plan


def test_another_condition_that_a_class_inherits_is_not_explained(root):
    line = f'if self.x > 1:\n            self.base_model_tp_plan["{Q_PROJ}"] = "rowwise"'
    edit(root, MIXTRAL, '__all__ = ["MixtralConfig"]', ADDED.format(line) + '\n\n__all__ = ["MixtralConfig"]')
    commit(root, "condition")
    edit(root, MIXTRAL, "self.x > 1", "self.x > 2")
    assert told(differences(root)) == [
        ("mixtral", Q_PROJ, "condition", True),
        ("offspring", Q_PROJ, "condition", False),
    ]


def test_another_style_under_another_condition_is_two_changes(root):
    kid(root, GUARDS["if"][0])
    edit(root, KID, "x > 1", "x > 2")
    edit(root, KID, "rowwise", "colwise")
    assert told(differences(root)) == [("kid", "norm", "removed", True), ("kid", "norm", "added", True)]


def test_modeling_source_rewritten_to_the_same_is_no_change(root):
    name = f"{PACKAGE}/models/mixtral/modeling_mixtral.py"
    edit(root, name, "class Mixtral", "# a comment\nclass Mixtral")
    assert differences(root) == ()


def test_modeling_classes_have_plans_too(root):
    name = f"{PACKAGE}/models/mixtral/modeling_mixtral.py"
    edit(root, name, '_tp_plan = {"lm_head": "colwise_gather_output"}', '_tp_plan = {"lm_head": "colwise"}')
    assert told(differences(root)) == [("mixtral", "lm_head", "meaning", True)]


def test_a_file_that_does_not_parse_stops_no_other(root):
    edit(root, MIXTRAL, '"layers.*.self_attn.q_proj": "colwise"', '"layers.*.self_attn.q_proj": ')
    edit(root, f"{PACKAGE}/models/llama/configuration_llama.py", '"layers.*.mlp.up_proj": "colwise"', '"x": "colwise"')
    repository = find_repository(root)
    found = compare(repository.revision("HEAD"), repository.working_tree())
    assert {one.model for one in found.differences} == {"llama"}
    assert all(isinstance(error, SourceError) and "configuration_mixtral.py" in error.message for error in found.errors)
    assert found.errors


def test_only_what_changed_is_compared(root):
    edit(root, MIXTRAL, '"layers.*.self_attn.q_proj": "colwise"', '"layers.*.self_attn.q_proj": "rowwise"')
    (root / "README.md").write_text("not source\n")
    repository = find_repository(root)
    before, after = repository.revision("HEAD"), repository.working_tree()
    assert changed_paths(before, after) == {Path(MIXTRAL)}
    assert compare(before, after).files == 2


def test_touching_a_file_is_no_change(root):
    os.utime(root / MIXTRAL, (1, 1))
    repository = find_repository(root)
    assert changed_paths(repository.revision("HEAD"), repository.working_tree()) == frozenset()


def test_links_are_not_followed_out_of_the_repository(root, tmp_path):
    outside = tmp_path / "configuration_outside.py"
    outside.write_text('class OutsideConfig:\n    base_model_tp_plan = {"secret": "colwise"}\n')
    (root / MIXTRAL).unlink()
    (root / MIXTRAL).symlink_to(outside)
    assert all(one.kind == "removed" for one in differences(root))
    commit(root, "a link")
    assert all(one.kind == "removed" for one in differences(root, "HEAD~1", "HEAD"))


def test_a_tree_that_names_a_path_outside_is_refused(root):
    blob = git(root, "rev-parse", f"HEAD:{MIXTRAL}").strip()
    record = b"100644 configuration_x.py\0" + bytes.fromhex(blob)
    command = ["git", "hash-object", "-t", "tree", "-w", "--literally", "--stdin"]
    inner = subprocess.run(command, cwd=root, input=record, capture_output=True, check=True).stdout.decode().strip()
    outer = b"40000 ..\0" + bytes.fromhex(inner)
    tree = subprocess.run(command, cwd=root, input=outer, capture_output=True, check=True).stdout.decode().strip()
    evil = git(root, "commit-tree", "-m", "evil", tree).strip()
    with pytest.raises(SourceError, match="leads out of the repository"):
        find_repository(root).revision(evil)


@pytest.mark.parametrize("name", ["nowhere", "--help", "", "HEAD:src", "HEAD~99"])
def test_unknown_revisions(root, name):
    with pytest.raises(UsageError, match="git knows no revision"):
        find_repository(root).revision(name)


def test_no_repository(tmp_path):
    with pytest.raises(UsageError, match="not a git repository"):
        find_repository(tmp_path)


LINES = st.lists(st.sampled_from([b"a", b"b", b"c", b"", b"d"]), max_size=12)


@given(LINES, LINES)
def test_without_the_touched_lines_both_texts_are_the_same(old, new):
    removed, added = touched_lines(*(b"".join(line + b"\n" for line in lines) for lines in (old, new)))
    kept_old = [line for number, line in enumerate(old, 1) if number not in removed]
    kept_new = [line for number, line in enumerate(new, 1) if number not in added]
    assert kept_old == kept_new
