"""Plans in a model tree, from file to file."""

from __future__ import annotations

import os

import pytest

from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes
from tests.codemods.helpers import (
    MIGRATED,
    PACKED,
    REGULAR,
    chain,
    check_noop,
    check_transformed,
    codes,
    rewrite,
    write_tree,
)


def test_both_parameters_of_the_experts_get_their_own_styles(tmp_path):
    outcome = check_transformed(tmp_path, PACKED, MIGRATED)
    assert [(edit.line, edit.edit.code) for edit in outcome.changes[0].edits] == [(3, "MIG001"), (4, "MIG002")]


def test_annotated_assignments_count(tmp_path):
    check_transformed(
        tmp_path,
        PACKED.replace("base_model_tp_plan =", "base_model_tp_plan: dict[str, str] ="),
        MIGRATED.replace("base_model_tp_plan =", "base_model_tp_plan: dict[str, str] ="),
    )


@pytest.mark.parametrize("style", ["rowwise", "rowwise_allreduce", "local_rowwise"])
def test_every_row_style_of_down_proj(tmp_path, style):
    check_transformed(tmp_path, PACKED.replace('"rowwise"', f'"{style}"'), MIGRATED)


@pytest.mark.parametrize(
    "prefix", ["layers.*.experts", "layers.*.block_sparse_moe.experts", "layers.*.mlp.text_moe.experts", "experts"]
)
def test_every_path_to_the_experts(tmp_path, prefix):
    check_transformed(tmp_path, *(text.replace("layers.*.mlp.experts", prefix) for text in (PACKED, MIGRATED)))


def test_comments_quotes_and_layout_stay(tmp_path):
    before = """
    class ToyConfig(PreTrainedConfig):
        base_model_tp_plan = {  # the plan
            'layers.*.mlp.experts.gate_up_proj': 'packed_colwise',  # row because not linear

            # down
            "layers.*.mlp.experts.down_proj"   :   "rowwise"  ,
            "layers.*.mlp.gate_up_proj": "packed_colwise", "layers.*.mlp.down_proj": "rowwise" }; other = 1
    """
    after = before.replace("'packed_colwise'", "'moe_tp_gate_up_colwise'").replace(
        '"rowwise"  ,', '"moe_tp_down_rowwise"  ,'
    )
    check_transformed(tmp_path, before, after)


def test_a_module_that_sharded_gets_its_parameter_entries_before_it(tmp_path):
    before = """
    class ToyConfig(PreTrainedConfig):
        base_model_sp_plan = {
            "layers.*.self_attn.q_proj": "colwise",  # attention
            # the experts
            "layers.*.mlp.experts": "moe_experts_allreduce",  # hook
            "layers.*.mlp.gate": "replicated",
        }
    """
    after = """
    class ToyConfig(PreTrainedConfig):
        base_model_sp_plan = {
            "layers.*.self_attn.q_proj": "colwise",  # attention
            # the experts
            "layers.*.mlp.experts.gate_up_proj": "moe_tp_gate_up_colwise",
            "layers.*.mlp.experts.down_proj": "moe_tp_down_rowwise",
            "layers.*.mlp.experts": "moe_experts_allreduce",  # hook
            "layers.*.mlp.gate": "replicated",
        }
    """
    outcome = check_transformed(tmp_path, before, after)
    assert [edit.edit.code for edit in outcome.changes[0].edits] == ["MIG003", "MIG003"]


def test_entries_are_inserted_on_one_line_where_the_plan_is_one(tmp_path):
    write_tree(
        tmp_path,
        {
            "toy/configuration_toy.py": "class ToyConfig:\n"
            '    base_model_tp_plan = {"experts": "moe_experts_allreduce"}\n',
            "toy/modeling_toy.py": REGULAR,
        },
    )
    rewrite(tmp_path)
    assert (tmp_path / "toy/configuration_toy.py").read_text() == (
        'class ToyConfig:\n    base_model_tp_plan = {"experts.gate_up_proj": "moe_tp_gate_up_colwise", '
        '"experts.down_proj": "moe_tp_down_rowwise", "experts": "moe_experts_allreduce"}\n'
    )


def test_intermediate_names_are_renamed(tmp_path):
    before = MIGRATED.replace("moe_tp_gate", "moe_gate").replace("moe_tp_down", "moe_down")
    outcome = check_transformed(tmp_path, before, MIGRATED)
    assert [edit.edit.code for edit in outcome.changes[0].edits] == ["MIG004", "MIG005"]


def test_expert_parallel_plans_stay(tmp_path):
    check_noop(tmp_path, PACKED.replace("base_model_tp_plan", "base_model_ep_plan"))
    check_noop(tmp_path, PACKED.replace("base_model_tp_plan", "base_model_tp_ep_plan"))


def test_dense_layers_and_shared_experts_stay(tmp_path):
    check_noop(tmp_path, PACKED.replace("mlp.experts", "mlp.shared_experts"))


def test_a_computed_style_of_shared_experts_is_nobodys_affair(tmp_path):
    plan = '{"layers.*.mlp.shared_experts.up_proj": STYLE, "layers.*.mlp.shared_experts.down_proj": "rowwise"}'
    assert codes(check_noop(tmp_path, f"class ToyConfig:\n    base_model_tp_plan = {plan}\n")) == []
    check_noop(tmp_path, PACKED.replace("mlp.experts", "mlp"))


def test_what_is_no_plan_or_no_string_stays(tmp_path):
    check_noop(tmp_path, PACKED.replace("base_model_tp_plan", "layer_names"))
    check_noop(tmp_path, PACKED.replace('"packed_colwise"', "PACKED").replace('"rowwise"', "ROW"))


def test_the_dropped_style_is_found(tmp_path):
    outcome = check_noop(tmp_path, PACKED.replace("packed_colwise", "moe_gate_up_colwise_alt"))
    assert codes(outcome) == ["MIG201"]


def test_half_a_pair_is_found(tmp_path):
    outcome = check_noop(tmp_path, PACKED.replace('"rowwise"', '"colwise"'))
    assert codes(outcome) == ["MIG202"]


def test_without_modeling_source_nothing_is_guessed(tmp_path):
    outcome = check_noop(tmp_path, PACKED, modeling=None)
    assert codes(outcome) == ["MIG203"]
    assert outcome.findings[0].line == 3


def test_a_file_that_does_not_parse_stops_no_other(tmp_path):
    write_tree(
        tmp_path,
        {
            "toy/configuration_toy.py": PACKED,
            "toy/modeling_toy.py": REGULAR,
            "bad/configuration_bad.py": PACKED + "\ndef broken(:\n",
        },
    )
    outcome = plan_rewrites([tmp_path])
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]
    assert len(outcome.errors) == 1
    assert "configuration_bad.py:8: does not parse" in outcome.errors[0].message


@pytest.mark.parametrize(
    ("encoding", "bom", "newline"),
    [("utf-8", b"", "\r\n"), ("utf-8", b"\xef\xbb\xbf", "\n"), ("latin-1", b"", "\n"), ("utf-8", b"", "\r")],
)
def test_encoding_bom_and_newlines_stay(tmp_path, encoding, bom, newline):
    cookie = f"# -*- coding: {encoding} -*-\n# caf\u00e9 \u00fc\n"
    text = (cookie + PACKED.lstrip().rstrip("\n")).replace("\n", newline)
    write_tree(tmp_path, {"toy/modeling_toy.py": REGULAR})
    path = tmp_path / "toy/configuration_toy.py"
    path.write_bytes(bom + text.encode(encoding))
    rewrite(tmp_path)
    expected = text.replace("packed_colwise", "moe_tp_gate_up_colwise").replace('"rowwise"', '"moe_tp_down_rowwise"')
    assert path.read_bytes() == bom + expected.encode(encoding)


def test_mode_bits_stay(tmp_path):
    write_tree(tmp_path, {"toy/configuration_toy.py": PACKED, "toy/modeling_toy.py": REGULAR})
    path = tmp_path / "toy/configuration_toy.py"
    path.chmod(0o754)
    rewrite(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o754
    assert sorted(found.name for found in path.parent.iterdir()) == ["configuration_toy.py", "modeling_toy.py"], (
        "no temporary file stays"
    )


def test_a_file_changed_meanwhile_is_refused(tmp_path):
    write_tree(tmp_path, {"toy/configuration_toy.py": PACKED, "toy/modeling_toy.py": REGULAR})
    outcome = plan_rewrites([tmp_path])
    path = tmp_path / "toy/configuration_toy.py"
    path.write_text(PACKED + "# mine\n")
    written = write_changes(outcome.changes)
    assert written.changes == ()
    assert "changed by someone else" in written.errors[0].message
    assert path.read_text() == PACKED + "# mine\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    base_model_tp_plan =", "    if True:\n     base_model_tp_plan ="),
        ("    base_model_tp_plan =", "    names = base_model_tp_plan ="),
        ("    base_model_tp_plan = {", "    base_model_tp_plan = dict(**{"),
        (': "packed_colwise"', ":  # why\n          'packed_colwise'"),
        ("class ToyConfig(PreTrainedConfig):", "try:\n  pass\nexcept KeyError:\n class ToyConfig(PreTrainedConfig):"),
        ("class ToyConfig(PreTrainedConfig):", "for _ in []:\n class ToyConfig(PreTrainedConfig):"),
    ],
)
def test_wherever_a_plan_stands(tmp_path, old, new):
    def put(text):
        changed = text.replace(old, new)
        return changed.replace("    }\n", "    })\n") if "dict(" in new else changed

    before, after = put(PACKED), put(PACKED).replace("packed_colwise", "moe_tp_gate_up_colwise")
    check_transformed(tmp_path, before, after.replace('"rowwise"', '"moe_tp_down_rowwise"'))


def test_nested_classes_of_one_name_are_two(tmp_path):
    nested = "\n".join(f"    {line}" for line in PACKED.strip().splitlines())
    both = f"class A:\n{nested}\n\n\nclass B:\n{nested}\n"
    migrated = both.replace("packed_colwise", "moe_tp_gate_up_colwise").replace('"rowwise"', '"moe_tp_down_rowwise"')
    outcome = check_transformed(tmp_path, both, migrated)
    assert [edit.class_name for edit in outcome.changes[0].edits] == ["A.ToyConfig"] * 2 + ["B.ToyConfig"] * 2


@pytest.mark.parametrize("taken", ["**BASE", "**ParentConfig.base_model_tp_plan", "**make()"])
def test_entries_taken_in_from_elsewhere_may_be_there_already(tmp_path, taken):
    plan = f'class ToyConfig:\n    base_model_tp_plan = {{{taken}, "layers.*.mlp.experts": "moe_experts_allreduce"}}\n'
    assert codes(check_noop(tmp_path, plan)) == ["MIG204"]
    half = f'class ToyConfig:\n    base_model_tp_plan = {{{taken}, "experts.gate_up_proj": "packed_colwise"}}\n'
    assert codes(check_noop(tmp_path, half)) == ["MIG204"]


def test_a_link_given_means_what_it_leads_to(tmp_path):
    chain(tmp_path / "real", depth=1)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    outcome = plan_rewrites([tmp_path / "link", tmp_path / "link/toy/../../real"])
    assert [change.path for change in outcome.changes] == [
        tmp_path / "real/toy/configuration_toy.py",
        tmp_path / "real/m0/configuration_m0.py",
    ]
    (tmp_path / "toy").symlink_to(tmp_path / "real/toy")
    assert codes(plan_rewrites([tmp_path / "toy"])) == ["MIG304"], "its copies are looked for beside what it leads to"


def test_links_out_of_the_tree_are_not_followed(tmp_path):
    write_tree(tmp_path, {"out/configuration_toy.py": PACKED, "out/modeling_toy.py": REGULAR, "in/toy/x.py": ""})
    (tmp_path / "in/toy/configuration_toy.py").symlink_to(tmp_path / "out/configuration_toy.py")
    outcome = rewrite(tmp_path / "in")
    assert outcome.changes == ()
    assert codes(outcome) == ["MIG305"]


def test_what_is_no_file_is_passed_over(tmp_path):
    write_tree(tmp_path, {"toy/configuration_toy.py": PACKED, "toy/modeling_toy.py": REGULAR})
    os.mkfifo(tmp_path / "toy/configuration_pipe.py")
    (tmp_path / "toy/.#configuration_toy.py").symlink_to("nobody@nowhere")
    assert len(rewrite(tmp_path).changes) == 1


def test_a_codec_of_bytes_is_an_error_of_that_file_only(tmp_path):
    write_tree(tmp_path, {"toy/configuration_toy.py": PACKED, "toy/modeling_toy.py": REGULAR})
    write_tree(tmp_path, {"bad/configuration_bad.py": "# coding: rot13\n" + PACKED})
    outcome = plan_rewrites([tmp_path])
    assert len(outcome.changes) == 1
    assert "rot13" in outcome.errors[0].message


def test_a_long_comment_takes_no_time(tmp_path):
    check_noop(tmp_path, f'class ToyConfig:\n    base_model_tp_plan = {{}}\n    kind = "experts"  {"#" * 200}\n')


VISION = (
    REGULAR
    + """

class ToySparse(nn.Module):
    def __init__(self, config):
        self.experts = ToyExperts(config)


class ToyLayer(nn.Module):
    def __init__(self, config):
        self.mlp = ToySparse(config)


class ToyBlock(nn.Module):
    def __init__(self, config):
        self.experts = nn.ModuleList([nn.Linear(1, 1) for _ in range(2)])


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig):
        self.layers = nn.ModuleList([ToyLayer(config)])
        self.blocks = nn.ModuleList([ToyBlock(config)])
"""
)


def test_a_regular_class_vouches_for_its_own_keys_only(tmp_path):
    plan = 'class ToyConfig:\n    base_model_tp_plan = {{"{key}": "moe_experts_allreduce"}}\n'
    outcome = check_noop(tmp_path / "list", plan.format(key="blocks.*.experts"), modeling=VISION)
    assert codes(outcome) == ["MIG203"]
    write_tree(tmp_path / "packed", {"toy/configuration_toy.py": plan.format(key="layers.*.mlp.experts")})
    write_tree(tmp_path / "packed", {"toy/modeling_toy.py": VISION})
    assert len(rewrite(tmp_path / "packed").changes) == 1


@pytest.mark.parametrize("key", ['("layers.*.mlp.experts")', '(\n        "layers.*.mlp."\n        "experts"\n    )'])
def test_a_key_in_parentheses_is_not_written_into(tmp_path, key):
    plan = f'class ToyConfig:\n    base_model_tp_plan = {{\n    {key}: "moe_experts_allreduce"}}\n'
    assert codes(check_noop(tmp_path, plan)) == ["MIG204"]
