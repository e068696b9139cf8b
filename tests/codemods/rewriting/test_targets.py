"""Whole models from dialect to dialect and back, as text."""

from __future__ import annotations

import shutil

import pytest

from codemods.checking.check import check_paths
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes
from plans.errors import UsageError
from tests.codemods.helpers import write_tree

MODELS = ("mixtral", "qwen2_moe", "qwen3_moe", "mellum", "deepseek_v3", "youtu", "llama", "llama4", "aria", "gemma4")


@pytest.fixture
def models(tmp_path, installed_transformers):
    for name in MODELS:
        source = installed_transformers / "models" / name
        shutil.copytree(source, tmp_path / "models" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "models"


def texts(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.py")}


def move(folder, source, target):
    outcome = plan_rewrites([folder], target=target, source=source)
    assert outcome.errors == ()
    assert write_changes(outcome.changes).errors == ()
    assert plan_rewrites([folder], target=target, source=target).changes == (), "twice is the same as once"
    return outcome


@pytest.mark.parametrize("target", ["dtensor", "transformers-5.16"])
def test_there_and_back_is_the_same_text(models, target):
    before = texts(models)
    forth = move(models, "transformers-5.23", target)
    moved = texts(models)
    lost = {(found.path, found.line) for found in forth.findings}
    back = move(models, target, "transformers-5.23")
    assert texts(models) == before
    if target == "dtensor":
        assert len(forth.changes) == len(back.changes) > 10
        assert b'"rowwise_allreduce"' in moved[models / "llama/configuration_llama.py"]
        # Some models' heads are inherited from models that this sample leaves out.
        of_configs = [found for found in forth.findings if found.attribute.startswith("base_model_")]
        assert {found.finding.code for found in of_configs} == {"MIG401"}
        untouched = (models / "llama4/configuration_llama4.py").read_text().splitlines()
        assert all(
            "packed_rowwise" not in line or (models / "llama4/configuration_llama4.py", number) in lost
            for number, line in enumerate(untouched, 1)
        )


OLD_REMOTE_CODE = """
class ToyConfig(PretrainedConfig):
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "local_packed_rowwise",
        "layers.*.mlp.experts.down_proj": "local_colwise",
        "layers.*.mlp.experts": "gather",
        "lm_head": "colwise_rep",
    }
"""

TRANSPOSED = """
class ToyExperts(nn.Module):
    def __init__(self, config):
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_size, 2 * self.expert_dim))
        self.down_proj = nn.Parameter(torch.empty((self.num_experts, self.expert_dim, self.hidden_size)))


class ToyMLP(nn.Module):
    def __init__(self, config):
        self.experts = ToyExperts(config)


class ToyAttention(nn.Module):
    def __init__(self, config):
        self.q_proj = nn.Linear(1, 1)
        self.o_proj = nn.Linear(1, 1)


class ToyLayer(nn.Module):
    def __init__(self, config):
        self.self_attn = ToyAttention(config)
        self.mlp = ToyMLP(config)


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig):
        self.layers = nn.ModuleList([ToyLayer(config) for _ in range(2)])


class ToyForCausalLM(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig):
        self.model = ToyModel(config)
        self.lm_head = nn.Linear(1, 1)
"""


def test_old_remote_code_comes_to_the_newest_release(tmp_path):
    write_tree(tmp_path, {"toy/configuration_toy.py": OLD_REMOTE_CODE, "toy/modeling_toy.py": TRANSPOSED})
    outcome = plan_rewrites([tmp_path], target="transformers-5.23")
    assert outcome.dialect is not None
    assert outcome.dialect.dialect == "transformers-4.57"
    assert write_changes(outcome.changes).errors == ()
    expected = OLD_REMOTE_CODE.replace("local_packed_rowwise", "packed_rowwise").replace("local_colwise", "colwise")
    expected = expected.replace('"gather"', '"moe_tp_experts"').replace("colwise_rep", "colwise_gather_output")
    assert (tmp_path / "toy/configuration_toy.py").read_text() == expected.lstrip()
    assert outcome.findings == ()


def test_an_unknown_target_is_refused(tmp_path):
    with pytest.raises(UsageError):
        plan_rewrites([tmp_path], target="klingon")
    with pytest.raises(UsageError):
        plan_rewrites([tmp_path], target="dtensor", source="klingon")
    with pytest.raises(UsageError):
        plan_rewrites([tmp_path], source="klingon")
    with pytest.raises(UsageError):
        check_paths([tmp_path], target="klingon")


@pytest.mark.parametrize("target", ["param-level", "dtensor"])
def test_an_overlay_is_no_source(tmp_path, target):
    for run in (plan_rewrites, check_paths):
        with pytest.raises(UsageError, match="param-level") as caught:
            run([tmp_path], source="param-level", target=target)
        assert "transformers-5.23" in caught.value.hint
        assert "param-level" not in caught.value.hint


def test_check_finds_pending_what_a_rewrite_to_the_target_does(models):
    rewritten = plan_rewrites([models], target="dtensor", source="transformers-5.23")
    checked = check_paths([models], target="dtensor", source="transformers-5.23")
    assert checked.changes == rewritten.changes
    assert len(checked.changes) > 10
    assert len(rewritten.findings) > 0
    assert set(rewritten.findings) <= set(checked.findings)
