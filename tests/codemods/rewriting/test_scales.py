"""Entries of quantizers' scales in source: rewritten with their weights, held with them, never called impossible."""

from __future__ import annotations

import pytest

from codemods.checking.check import check_paths
from codemods.rewriting.migrate import plan_rewrites
from tests.codemods.checking.test_check import DENSE
from tests.codemods.helpers import MIGRATED, PACKED, REGULAR, check_noop, check_transformed, codes, write_tree

SCALES = (
    '        "layers.*.mlp.experts.gate_up_proj_scale_inv": "packed_colwise",\n'
    '        "layers.*.mlp.experts.down_proj.weight_scale_inv": "rowwise",\n    }\n'
)
NEW_SCALES = SCALES.replace("packed_colwise", "moe_tp_gate_up_colwise").replace('"rowwise"', '"moe_tp_down_rowwise"')


def test_scales_in_a_class_body_are_rewritten_with_their_weights(tmp_path):
    check_transformed(tmp_path, PACKED.replace("    }\n", SCALES), MIGRATED.replace("    }\n", NEW_SCALES))


@pytest.mark.parametrize(
    "code",
    [
        'self.base_model_tp_plan["layers.*.mlp.experts.gate_up_proj_scale_inv"] = "packed_colwise"',
        'self.base_model_tp_plan.update({"layers.*.mlp.experts.gate_up_proj_scale": "packed_colwise"})',
        'self.base_model_tp_plan |= {"layers.*.mlp.experts.gate_up_proj.weight_scale_inv": "packed_colwise"}',
        'self.base_model_tp_plan.setdefault("layers.*.mlp.experts.gate_up_proj_scales", "packed_colwise")',
    ],
)
@pytest.mark.parametrize("condition", ["", "if config.quantized:\n            "])
def test_scales_that_code_adds_are_rewritten_too(tmp_path, code, condition):
    method = f"\n    def __post_init__(self, **kwargs):\n        {condition}{code}\n"
    after = MIGRATED + method.replace("packed_colwise", "moe_tp_gate_up_colwise")
    check_transformed(tmp_path, PACKED + method, after)


@pytest.mark.parametrize(
    "code",
    [
        'self.base_model_tp_plan["layers.*.mlp.experts.gate_up_proj_scale_inv"] = self.style',
        'self.base_model_tp_plan["layers.*.mlp.experts.gate_up_proj_scale_inv"] = "colwise"',
        'self.base_model_tp_plan.update({"layers.*.mlp.experts.down_proj.weight_scale": "packed_colwise"})',
    ],
)
def test_scales_that_cannot_follow_hold_their_weights(tmp_path, code):
    outcome = check_noop(tmp_path, f"{PACKED}\n    def __post_init__(self, **kwargs):\n        {code}\n")
    assert set(codes(outcome)) <= {"MIG204", "MIG207"}
    assert outcome.findings
    assert codes(check_paths([tmp_path], source="transformers-5.23")), "a plan that stays is named"


@pytest.mark.parametrize(
    "key",
    [
        "layers.*.mlp.experts.gate_up_proj_scale_inv",
        "layers.*.mlp.experts.down_proj_activation_scale",
        "layers.*.self_attn.q_proj.weight_scale_inv",
        "layers.*.self_attn.q_proj.weight_scale",
        "layers.*.self_attn.q_proj.input_scale",
        "layers.*.self_attn.q_proj.qweight",
        "layers.*.mlp.up_proj.weight_zero_point",
        "*.self_attn.q_proj.weight_g_idx",
    ],
)
def test_what_a_quantizer_makes_is_not_impossible(tmp_path, key):
    plan = f'class ToyConfig:\n    base_model_tp_plan = {{"{key}": "colwise"}}\n'
    write_tree(tmp_path, {"toy/configuration_toy.py": plan, "toy/modeling_toy.py": REGULAR + DENSE})
    assert codes(check_paths([tmp_path], source="transformers-5.23")) == []


@pytest.mark.parametrize(
    "key", ["layers.*.self_atn.q_proj.weight_scale_inv", "layers.*.mlp.experts.gate_proj_scale_inv"]
)
def test_scales_of_weights_that_cannot_exist_are_impossible(tmp_path, key):
    plan = f'class ToyConfig:\n    base_model_tp_plan = {{"{key}": "colwise"}}\n'
    write_tree(tmp_path, {"toy/configuration_toy.py": plan, "toy/modeling_toy.py": REGULAR + DENSE})
    assert codes(check_paths([tmp_path], source="transformers-5.23")) == ["MIG506"]


TRANSPOSED = REGULAR.replace(
    "2 * self.intermediate_dim, self.hidden_dim", "self.hidden_dim, 2 * self.intermediate_dim"
).replace("self.hidden_dim, self.intermediate_dim))", "self.intermediate_dim, self.hidden_dim))")
QUANTIZER = """
class {name}HfQuantizer(HfQuantizer):
    def update_tp_plan(self, config):
        additional_plan = {{
{entries}        }}
        if "Toy" in config.__class__.__name__:
            config.get_text_config().base_model_tp_plan{use}
        return config
"""
NAMING_QUANTIZER = """
class FineGrainedFP8HfQuantizer(HfQuantizer):
    def update_tp_plan(self, config):
        if {condition}:
            text_plan = {{
{entries}            }}
            config.base_model_tp_plan = text_plan
        return config
"""
WEIGHTS = (
    '            "layers.*.mlp.experts.gate_up_proj": "packed_colwise",\n'
    '            "layers.*.mlp.experts.down_proj": "rowwise",\n'
)
SCALE = '            "layers.*.mlp.experts.gate_up_proj_scale_inv": "packed_colwise",\n'


@pytest.mark.parametrize("use", [" = additional_plan", ".update(additional_plan)"])
@pytest.mark.parametrize(("entries", "code"), [(WEIGHTS + SCALE, "MIG203"), (SCALE, "MIG206")])
def test_a_quantizers_own_plan_stays_whole_and_is_named(tmp_path, use, entries, code):
    for name in ("FineGrainedFP8", "CompressedTensors"):
        text = QUANTIZER.format(name=name, entries=entries, use=use)
        root = write_tree(tmp_path / name, {"quantizers/quantizer_x.py": text})
        outcome = plan_rewrites([root])
        assert outcome.changes == ()
        assert codes(outcome) == [code]
        assert codes(check_paths([root], source="transformers-5.23")) == [code]


@pytest.mark.parametrize("use", [" = additional_plan", ".update(additional_plan)"])
def test_a_quantizer_beside_its_model_rewrites_both(tmp_path, use):
    text = QUANTIZER.format(name="FineGrainedFP8", entries=WEIGHTS + SCALE, use=use).lstrip("\n")
    root = write_tree(tmp_path, {"toy/quantizer_toy.py": text, "toy/modeling_toy.py": REGULAR})
    (change,) = plan_rewrites([root]).changes
    after = text.replace("packed_colwise", "moe_tp_gate_up_colwise").replace('"rowwise"', '"moe_tp_down_rowwise"')
    assert change.data.decode() == after


@pytest.mark.parametrize("condition", ['"Toy" in config.__class__.__name__', 'type(config).__name__ == "ToyConfig"'])
@pytest.mark.parametrize(("modeling", "code"), [(REGULAR, None), (TRANSPOSED, "MIG101"), ("", "MIG203")])
def test_a_quantizers_plan_is_for_the_models_that_it_names(tmp_path, condition, modeling, code):
    text = NAMING_QUANTIZER.format(condition=condition, entries=(WEIGHTS + SCALE).replace("            ", " " * 16))
    files = {"quantizers/quantizer_x.py": text}
    files |= {
        "models/toy/configuration_toy.py": PACKED,
        "models/other/configuration_other.py": "class OtherConfig:\n    x = 1\n",
    }
    files["models/other/modeling_other.py"] = TRANSPOSED.replace("Toy", "Other")
    files |= {"models/toy/modeling_toy.py": modeling} if modeling else {}
    outcome = plan_rewrites([write_tree(tmp_path, files)])
    assert ("quantizer_x.py" in {change.path.name for change in outcome.changes}) is (code is None)
    found = [found.finding.code for found in outcome.findings if found.path.name == "quantizer_x.py"]
    assert found == ([code] if code else [])
