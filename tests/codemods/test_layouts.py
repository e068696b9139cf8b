"""The layout guard on source, and on every experts class of the installed transformers."""

from __future__ import annotations

import pytest

from codemods.layouts import read_layouts
from plans.layout import ExpertLayout
from tests.codemods.helpers import REGULAR, write_tree


def layouts(root, source):
    return read_layouts(write_tree(root, {"modeling_toy.py": source}))


def test_the_regular_layout(tmp_path):
    assert layouts(tmp_path, REGULAR) == (ExpertLayout("modeling_toy.py:ToyExperts"),)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * self.intermediate_dim", "self.intermediate_dim * 2"),
        ("torch.empty(self.num_experts,", "torch.zeros(self.num_experts + self.zero_experts,"),
        ("(torch.empty(", "(torch.empty(*[],"),
    ],
)
def test_other_ways_to_write_it(tmp_path, old, new):
    found = layouts(tmp_path, REGULAR.replace(old, new))
    assert found == ((ExpertLayout("modeling_toy.py:ToyExperts"),) if "*[]" not in new else (None,))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (("_implementation\n", "_implementation(is_concatenated=False)\n"), "MIG102"),
        ((".chunk(2, dim=-1)", "[..., ::2]"), "MIG102"),
        (("_implementation\n", "_implementation(is_transposed=True)\n"), "MIG101"),
        (("_implementation\n", "_implementation(has_gate=False)\n"), "MIG103"),
        (("_implementation\n", "_implementation(has_bias=True)\n"), "MIG105"),
        (
            (
                "    def forward",
                "        self.gate_up_proj_bias = nn.Parameter(torch.zeros(2, 2))\n\n    def forward",
            ),
            "MIG105",
        ),
    ],
)
def test_what_makes_a_layout_irregular(tmp_path, change, code):
    (found,) = layouts(tmp_path, REGULAR.replace(*change))
    assert found is not None
    assert found.irregularity == code


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("nn.functional.linear(hidden_states, self.gate_up_proj[0]).chunk(2, dim=-1)", "glu(hidden_states)"),
        (".chunk(2, dim=-1)", ".unflatten(-1, (-1, 2)).unbind(-1)"),
        (".chunk(2, dim=-1)", ".view(-1, 2)"),
        (".chunk(2, dim=-1)", ".chunk(2, dim=0)"),
        (".chunk(2, dim=-1)", ".chunk(2, dim=-1)[0].unflatten(-1, (-1, 2)).unbind(-1)"),
        ("_implementation\n", "_implementation(**FLAGS)\n"),
        ("_implementation\n", "_implementation(is_concatenated=FLAG)\n"),
        (".chunk(2, dim=-1)", "[slice(None, None, 2)]"),
        (
            "        self.down_proj =",
            "        self.scale = nn.Parameter(torch.empty(1, 2, 3))\n        self.down_proj =",
        ),
    ],
)
def test_what_does_not_show_is_not_assumed(tmp_path, old, new):
    assert layouts(tmp_path, REGULAR.replace(old, new)) == (None,)


@pytest.mark.parametrize("made", ["torch.nn.Parameter(", "Parameter("])
def test_a_parameter_by_another_name_is_seen(tmp_path, made):
    transposed = REGULAR.replace("2 * self.intermediate_dim, self.hidden_dim", "self.hidden_dim, 2 * self.width")
    (found,) = layouts(tmp_path, transposed.replace("nn.Parameter(", made)) or ("missed",)
    assert found is None
    both = layouts(tmp_path, REGULAR + transposed.replace("nn.Parameter(", made).replace("ToyExperts", "BarExperts"))
    assert both == (ExpertLayout("modeling_toy.py:ToyExperts"), None)


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "bias"])
def test_a_registered_bias_counts(tmp_path, name):
    registered = f"        self.register_parameter({name!r}, nn.Parameter(torch.zeros(2, 2)))\n\n    def forward"
    (found,) = layouts(tmp_path, REGULAR.replace("    def forward", registered))
    assert found is not None
    assert found.irregularity == "MIG105"
    (found,) = layouts(
        tmp_path, REGULAR.replace("    def forward", registered.replace("nn.Parameter(torch.zeros(2, 2))", "None"))
    )
    assert found is not None
    assert found.irregularity is None


def test_shapes_that_do_not_fit_are_not_guessed(tmp_path):
    assert layouts(tmp_path, REGULAR.replace("2 * self.intermediate_dim", "self.width")) == (None,)
    assert layouts(tmp_path, REGULAR.replace("self.down_proj =", "self.other =")) == (None,)


def test_dense_modules_are_no_experts(tmp_path):
    dense = REGULAR.replace("self.num_experts, ", "")
    assert layouts(tmp_path, dense) == ()
    separate = REGULAR.replace("gate_up_proj", "up_proj").replace(
        "        self.down_proj", "        self.gate_proj = nn.Parameter(torch.empty(1, 2, 3))\n        self.down_proj"
    )
    assert layouts(tmp_path, separate) == ()
