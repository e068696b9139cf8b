"""Two revisions of real model folders in a real git repository, compared by what their plans do."""

from __future__ import annotations

import shutil

import pytest

from codemods.comparing.difference import compare
from codemods.files.revisions import find_repository
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes
from plans.errors import SourceError
from tests.codemods.helpers import write_tree
from tests.codemods.repositories import (
    ADDED,
    CHILD,
    MIXTRAL,
    OFFSPRING,
    PACKAGE,
    Q_PROJ,
    commit,
    differences,
    edit,
    summarize,
)


def test_a_rewrite_only_renames(root):
    assert write_changes(plan_rewrites([root]).changes).errors == ()
    found = differences(root)
    assert {one.model for one in found} == {"mixtral", "qwen3_moe", "mellum", "gemma4", "offspring"}
    assert {one.kind for one in found} == {"renamed"}
    assert len(found) == 10
    assert {one.after.effect.placement for one in found} == {"Packed(1, 2)", "Shard(2)"}
    assert {one.model for one in found if not one.explained} == {"offspring"}, "it inherits, and renames are harmless"
    commit(root, "rewritten")
    assert differences(root, "HEAD~1", "HEAD") == found, "the working tree and its commit are compared alike"
    assert differences(root, "HEAD", "HEAD") == ()


def test_a_placement_that_a_class_inherits_is_not_explained(root):
    edit(root, MIXTRAL, '"layers.*.self_attn.q_proj": "colwise"', '"layers.*.self_attn.q_proj": "rowwise"')
    found = differences(root)
    assert summarize(found) == [
        ("mixtral", "layers.*.self_attn.q_proj", "placement", True),
        ("offspring", "layers.*.self_attn.q_proj", "placement", False),
    ]
    assert [(one.before.effect.placement, one.after.effect.placement) for one in found] == [
        ("Shard(0)", "Shard(1)")
    ] * 2
    assert {str(one.side.path) for one in found} == {MIXTRAL}, "where the inherited entry is written"


def test_other_communication_is_no_rename(root):
    edit(
        root, MIXTRAL, '"layers.*.self_attn.q_proj": "colwise"', '"layers.*.self_attn.q_proj": "colwise_gather_output"'
    )
    assert summarize(differences(root)) == [
        ("mixtral", "layers.*.self_attn.q_proj", "meaning", True),
        ("offspring", "layers.*.self_attn.q_proj", "meaning", False),
    ]


def test_entries_added_and_removed(root):
    edit(root, MIXTRAL, '"layers.*.self_attn.q_proj": "colwise",', '"layers.*.self_attn.new": "colwise",')
    assert summarize(differences(root)) == [
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
    found = compare(repository.read_revision("HEAD"), repository.read_working_tree())
    assert found.dialects == ("transformers-5.19", "transformers-5.23")
    assert summarize(found.differences) == [("toy", "embed", "placement", False)]
    (embed,) = found.differences
    assert (embed.before.effect.placement, embed.after.effect.placement) == ("Shard(1)", "Shard(0)")


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
    assert [(one.variant.plan, one.side.style, *summarize([one])[0][1:]) for one in differences(root)] == [
        ("base_model_ep_plan", "grouped_gemm", "layers.*.mlp.experts.down_proj", "meaning", False),
        ("base_model_tp_plan", "rowwise", "layers.*.mlp.experts.down_proj", "placement", False),
    ]


def test_a_style_that_cuts_a_dim_which_its_parameter_lacks_is_told_and_stops_nothing(root):
    edit(root, MIXTRAL, f'"{Q_PROJ}": "colwise"', '"layers.*.input_layernorm.weight": "moe_tp_gate_up_colwise"')
    _, added = (one for one in differences(root) if one.model == "mixtral")
    assert (added.key, added.kind) == ("layers.*.input_layernorm.weight", "added")
    assert added.after.effect.placement == "unknown (moe_tp_gate_up_colwise)"


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
    assert summarize(found) == [("mixtral", key, "removed", True), ("offspring", key, "removed", False)]
    assert {one.variant.plan for one in found} == {"base_model_tp_plan in __post_init__"}
    assert {one.after.effect.placement for one in found} == {"whole"}
    commit(root, "taken out")
    edit(root, MIXTRAL, line, "pass")
    assert summarize(differences(root)) == [("mixtral", key, "added", True), ("offspring", key, "added", False)]


def test_a_plan_that_code_replaces(root):
    line = f'self.base_model_tp_plan = {{"{Q_PROJ}": "rowwise"}}'
    edit(root, MIXTRAL, '__all__ = ["MixtralConfig"]', ADDED.format(line) + '\n\n__all__ = ["MixtralConfig"]')
    assert summarize(differences(root)) == [
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
    assert summarize(found) == [("mixtral", Q_PROJ, "placement", True), ("offspring", Q_PROJ, "placement", False)]
    assert {one.variant.plan for one in found} == {"base_model_tp_plan in __post_init__ if not (self.fused)"}


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
    assert summarize(differences(root)) == [
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
    found = [one for one in differences(root) if one.variant.plan == "base_model_tp_plan"]
    assert {one.key: one.after.effect.placement for one in found} == expected
    assert {(one.model, one.kind, one.explained) for one in found} == {("mixtral", "placement", False)}


def test_modeling_source_rewritten_to_the_same_is_no_change(root):
    name = f"{PACKAGE}/models/mixtral/modeling_mixtral.py"
    edit(root, name, "class Mixtral", "# a comment\nclass Mixtral")
    assert differences(root) == ()


def test_modeling_classes_have_plans_too(root):
    name = f"{PACKAGE}/models/mixtral/modeling_mixtral.py"
    edit(root, name, '_tp_plan = {"lm_head": "colwise_gather_output"}', '_tp_plan = {"lm_head": "colwise"}')
    assert summarize(differences(root)) == [("mixtral", "lm_head", "meaning", True)]


def test_a_file_that_does_not_parse_stops_no_other(root):
    edit(root, MIXTRAL, '"layers.*.self_attn.q_proj": "colwise"', '"layers.*.self_attn.q_proj": ')
    edit(root, f"{PACKAGE}/models/llama/configuration_llama.py", '"layers.*.mlp.up_proj": "colwise"', '"x": "colwise"')
    repository = find_repository(root)
    found = compare(repository.read_revision("HEAD"), repository.read_working_tree())
    assert {one.model for one in found.differences} == {"llama"}
    assert all(isinstance(error, SourceError) and "configuration_mixtral.py" in error.message for error in found.errors)
    assert found.errors
