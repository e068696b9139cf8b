"""Rewritten plans on the installed transformers: its own `from_pretrained` runs them once it knows their names."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch.torch_version import TorchVersion
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

import runtime.released.bridge
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes
from plans.dialect import dialect_for_release
from plans.errors import IndivisibleError, PlanError, UnknownStyleError, UsageError
from plans.placement import Shard
from runtime import Plan, register_styles
from runtime.released.bridge import ReleasedStyle
from tests.runtime.installed_torch import tells_packed
from tests.runtime.rank_pool import RankPool
from tests.runtime.released import bridge_cases
from tests.tiny_models import MODELS, tiny_model

RELEASE = dialect_for_release(transformers.__version__)
NAMES = ("mixtral", "qwen3_moe")
SIZES = {"vocab_size": 104, "intermediate_size": 64}
EXPERTS = "layers.*.mlp.experts"
BRANCH_EP = {
    "layers.*.mlp.gate": "ep_router",
    f"{EXPERTS}.gate_up_proj": "grouped_gemm",
    f"{EXPERTS}.down_proj": "grouped_gemm",
    EXPERTS: "moe_experts_allreduce",
}

Checkpoint = Callable[..., Path]
Rewritten = Callable[[str, str], dict[str, dict[str, str]]]

combines = pytest.mark.skipif(not RELEASE.expert_plan_needs, reason="expert plans replace TP plans in this release")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return a function from a model's name, sizes and form to a folder of its weights."""
    folders: dict[str, Path] = {}

    def saved(name: str, *, fused: bool = False, **sizes: object) -> Path:
        key = f"{name} {fused} {sizes}"
        if key not in folders:
            config, usual = MODELS[name]
            # Sizes that divide: 5.17 and 5.18 gather no other vocabulary, grouped kernels take no other slices.
            model = tiny_model(getattr(transformers, config)(**usual | SIZES | sizes))
            folders[key] = tmp_path_factory.mktemp(name) / "checkpoint"
            model.save_pretrained(folders[key], save_original_format=not fused)
        return folders[key]

    return saved


@pytest.fixture(scope="module")
def rewrite(tmp_path_factory: pytest.TempPathFactory, installed_transformers: Path) -> Rewritten:
    """Return a function from a model's name and a target dialect to its plans after our rewrite of its source."""

    def plans(name: str, target: str) -> dict[str, dict[str, str]]:
        models = tmp_path_factory.mktemp("tree") / "models"
        shutil.copytree(installed_transformers / "models" / name, models / name)
        outcome = plan_rewrites([models], target=target, source=RELEASE.name)
        assert outcome.errors == ()
        assert write_changes(outcome.changes).errors == ()
        tree = ast.parse((models / name / f"configuration_{name}.py").read_text("utf-8"))
        return {
            target.id: ast.literal_eval(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and target.id == "base_model_tp_plan"
        }

    return plans


@pytest.fixture
def untaught() -> Iterator[None]:
    with bridge_cases.untaught():
        yield


def assert_small(errors: dict[str, float]) -> None:
    assert len(errors) > 25
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 1e-5, (worst, errors[worst])


@tells_packed
@pytest.mark.parametrize("target", ["param-level", "dtensor"])
@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_a_rewritten_plan_computes_what_the_unsharded_model_does(
    name: str, fused: bool, target: str, two_ranks: RankPool, checkpoint: Checkpoint, rewrite: Rewritten
) -> None:
    plans = rewrite(name, target)
    assert "moe_tp_gate_up_colwise" in plans["base_model_tp_plan"].values()
    assert ("moe_experts_allreduce" in plans["base_model_tp_plan"].values()) == (target == "dtensor")
    for errors, places in two_ranks.run(bridge_cases.parity, checkpoint(name, fused=fused), plans, {"tp_size": 2}):
        assert_small(errors)
        assert places["model.layers.0.mlp.experts.gate_up_proj"] == "Packed(1, 2)"
        assert places["model.layers.0.mlp.experts.down_proj"] == "Shard(2)"


@pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.13"),
    reason="torch 2.11 makes no packed parameter whole, packed_colwise neither",
)
@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_was_loaded(
    name: str, fused: bool, two_ranks: RankPool, checkpoint: Checkpoint, rewrite: Rewritten, tmp_path: Path
) -> None:
    found = two_ranks.run(
        bridge_cases.saved_and_loaded,
        checkpoint(name, fused=fused),
        tmp_path / "saved",
        rewrite(name, "dtensor"),
    )
    assert found == [(True, True)] * 2


@pytest.mark.parametrize("target", ["param-level", "dtensor"])
def test_without_its_names_the_release_refuses_the_plan(
    target: str, two_ranks: RankPool, checkpoint: Checkpoint, rewrite: Rewritten
) -> None:
    for message in two_ranks.run(_untaught_refusal, checkpoint("mixtral"), rewrite("mixtral", target), {"tp_size": 2}):
        assert "Unsupported" in message
        assert "moe_tp_gate_up_colwise" in message


def _untaught_refusal(folder: Path, plans: bridge_cases.Plans, options: dict[str, int]) -> str:
    return bridge_cases.refusal(folder, plans, options, taught=False)


@tells_packed
def test_a_sequence_parallel_plan_runs_as_the_releases_tp_plan(two_ranks: RankPool, checkpoint: Checkpoint) -> None:
    for errors, places in two_ranks.run(bridge_cases.parity_of_mode, checkpoint("mixtral"), "sp", {"tp_size": 2}):
        assert_small(errors)
        assert places["model.layers.0.mlp.experts.gate_up_proj"] == "Packed(1, 2)"


@tells_packed
@combines
def test_sequence_and_expert_parallel_plans_run_together(two_ranks: RankPool, checkpoint: Checkpoint) -> None:
    options = {"tp_size": 2, "ep_size": 2}
    for errors, places in two_ranks.run(bridge_cases.parity_of_mode, checkpoint("mixtral"), "sp_ep", options):
        assert_small(errors)
        assert places["model.layers.0.mlp.experts.gate_up_proj"] == "Shard(0)"


@tells_packed
@combines
def test_expert_parallel_plans_go_with_rewritten_ones(
    two_ranks: RankPool, checkpoint: Checkpoint, rewrite: Rewritten
) -> None:
    plans, options = rewrite("qwen3_moe", "dtensor"), {"tp_size": 2, "ep_size": 2}
    for errors, places in two_ranks.run(bridge_cases.parity, checkpoint("qwen3_moe"), plans, options):
        assert_small(errors)
        assert places["model.layers.0.mlp.experts.gate_up_proj"] == "Shard(0)"


@tells_packed
@pytest.mark.usefixtures("untaught")
def test_the_branchs_expert_plan_runs_or_is_refused(two_ranks: RankPool, checkpoint: Checkpoint) -> None:
    """5.17 and 5.18 run it; 5.23 refuses routers; those between pass over it, and only `require` says so."""
    folder, plans, support = checkpoint("mixtral"), {"base_model_ep_plan": BRANCH_EP}, register_styles()
    if RELEASE.expert_plan_needs:
        with pytest.raises(PlanError, match=r"would silently not apply this expert plan|no style 'ep_router'"):
            support.require(Plan("ep", BRANCH_EP))
    if RELEASE.expert_plan_refuses:
        (message, _) = two_ranks.run(_taught_refusal, folder, plans, {"tp_size": 2, "ep_size": 2})
        assert "`ep_router` style was removed" in message
    if not RELEASE.expert_plan_needs:
        support.require(Plan("ep", BRANCH_EP))
        options = {"tp_size": 2, "enable_expert_parallel": True}
        for errors, places in two_ranks.run(bridge_cases.parity, folder, plans, options):
            assert_small(errors)
            assert places["model.layers.0.mlp.experts.gate_up_proj"] == "Shard(0)"


def _taught_refusal(folder: Path, plans: bridge_cases.Plans, options: dict[str, int]) -> str:
    return bridge_cases.refusal(folder, plans, options, taught=True)


@tells_packed
def test_groups_that_do_not_divide_are_refused_before_anything_is_loaded(
    two_ranks: RankPool, checkpoint: Checkpoint, rewrite: Rewritten
) -> None:
    folder = checkpoint("qwen3_moe", moe_intermediate_size=15)
    with pytest.raises(IndivisibleError, match=r"layers\.0\.mlp\.experts\.gate_up_proj: tp=2 .* 15 each") as caught:
        two_ranks.run(bridge_cases.load_only, folder, rewrite("qwen3_moe", "param-level"))
    assert caught.value.data["works"] == [1, 3, 5, 15]


@tells_packed
def test_summed_experts_that_are_whole_are_refused_not_multiplied(two_ranks: RankPool, checkpoint: Checkpoint) -> None:
    plans = {"base_model_tp_plan": {EXPERTS: "moe_experts_allreduce"}}
    with pytest.raises(PlanError, match="its output would be multiplied by 2"):
        two_ranks.run(bridge_cases.load_only, checkpoint("mixtral"), plans)


@tells_packed
def test_a_parameters_style_on_a_module_is_refused(two_ranks: RankPool, checkpoint: Checkpoint) -> None:
    plans = {"base_model_tp_plan": {EXPERTS: "moe_tp_down_rowwise"}}
    with pytest.raises(PlanError, match="'moe_tp_down_rowwise' is for parameters, but its key names a module"):
        two_ranks.run(bridge_cases.load_only, checkpoint("mixtral"), plans)


@tells_packed
def test_an_expert_style_on_a_matrix_is_refused(two_ranks: RankPool, checkpoint: Checkpoint) -> None:
    plans = {"base_model_tp_plan": {"layers.*.self_attn.o_proj": "moe_tp_down_rowwise"}}
    with pytest.raises(
        PlanError, match=r"o_proj\.weight: 'moe_tp_down_rowwise' is not defined for a parameter with 2 dims"
    ):
        two_ranks.run(bridge_cases.load_only, checkpoint("mixtral"), plans)


def test_a_models_structure_is_checked_on_a_mesh_without_names(two_ranks: RankPool) -> None:
    assert two_ranks.run(bridge_cases.mismatches_on_a_mesh_without_names, Shard(0)) == [[], []]
    (found, _) = two_ranks.run(bridge_cases.mismatches_on_a_mesh_without_names, Shard(1))
    assert [one.found for one in found] == ["tp: Shard(0), local shape [2, 4]"]


@tells_packed
@pytest.mark.usefixtures("untaught")
def test_registering_adds_what_is_missing_and_nothing_else() -> None:
    before = dict(ALL_PARALLEL_STYLES)
    support = register_styles()
    after = dict(ALL_PARALLEL_STYLES)
    assert {name: after[name] for name in before} == before
    assert set(support.styles) == after.keys() - before.keys()
    assert {
        "moe_tp_gate_up_colwise", "moe_tp_down_rowwise", "moe_experts_allreduce", "rowwise_allreduce",
        "colwise_allgather", "vocab_allreduce", "activation", "module_allgather_split", "rowwise_reduce_scatter",
    } <= set(support.styles)  # fmt: skip
    assert ("ep_router" in after) == ("ep_router" in before)
    assert register_styles() == support
    assert all(ALL_PARALLEL_STYLES[name] is after[name] for name in after)


@tells_packed
@pytest.mark.usefixtures("untaught")
def test_a_style_that_someone_else_registered_stays_theirs() -> None:
    theirs = ReleasedStyle(runtime.released.bridge.STYLES.styles["replicate"], RELEASE.styles["colwise"])
    ALL_PARALLEL_STYLES.register("moe_tp_down_rowwise", theirs)
    register_styles()
    assert ALL_PARALLEL_STYLES["moe_tp_down_rowwise"] is theirs


@tells_packed
@pytest.mark.usefixtures("untaught")
def test_what_a_release_would_not_apply_is_said_before_it_is_loaded() -> None:
    support = register_styles()
    support.require(Plan("tp", {f"model.{EXPERTS}": "moe_experts_allreduce"}))
    with pytest.raises(UnknownStyleError, match="has no style 'colwise_loss_parallel'"):
        support.require(Plan("tp", {"lm_head": "colwise_loss_parallel"}))
    with pytest.raises(UnknownStyleError, match="'colwize'") as caught:
        support.require(Plan("tp", {"lm_head": "colwize"}))
    assert caught.value.hint.startswith("did you mean colwise? run the plan")
    with pytest.raises(PlanError, match=r"layers\.3\.mlp' matches nothing in transformers"):
        support.require(Plan("sp", {"model.layers.3.mlp": "module_allgather"}))


@pytest.mark.parametrize(
    ("release", "mode", "experts", "error", "says"),
    [
        ("5.17.0", "ep", ("grouped_gemm", "ep_router", "moe_experts_allreduce"), None, ""),
        ("5.18.0", "tp_ep", ("grouped_gemm", "ep_router", "moe_experts_allreduce"), UsageError, "cannot run mode"),
        ("5.20.0", "ep", ("grouped_gemm", "ep_router", "moe_experts_allreduce"), PlanError, "would silently not apply"),
        ("5.20.0", "ep", ("grouped_gemm", "ep_router", "moe_tp_experts"), None, ""),
        ("5.23.0", "ep", ("grouped_gemm", "ep_router", "moe_experts_allreduce"), UnknownStyleError, "no style"),
        ("5.23.0", "tp_ep", ("grouped_gemm", "moe_tp_experts"), PlanError, "refuses 'moe_tp_experts'"),
        ("5.23.0", "tp_ep", ("grouped_gemm", "moe_experts_allreduce"), PlanError, "would silently not apply"),
        ("5.23.0", "tp_ep", ("grouped_gemm", "ep_dispatch_experts"), None, ""),
    ],
)
def test_which_release_takes_which_expert_plan(
    release: str, mode: str, experts: tuple[str, ...], error: type[Exception] | None, says: str
) -> None:
    known = frozenset(dialect_for_release(release).styles) | {"moe_experts_allreduce"}
    keys = {"grouped_gemm": f"{EXPERTS}.down_proj", "ep_router": "layers.*.mlp.gate"}
    plan = Plan(mode, {keys.get(style, EXPERTS): style for style in experts})
    support = runtime.released.bridge.Support(release, (), known)
    if error is None:
        support.require(plan)
    else:
        with pytest.raises(error, match=says) as caught:
            support.require(plan)
        assert "runtime.parallelize" in caught.value.hint


@pytest.mark.parametrize("release", ["5.15.0", "5.16.0"])
def test_releases_that_pass_over_unknown_styles_are_refused(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.released.bridge, "transformers_version", lambda: release)
    with pytest.raises(
        UsageError, match=rf"styles cannot be registered with transformers {release}: it skips unknown styles"
    ) as caught:
        register_styles()
    assert "runtime.parallelize" in caught.value.hint


def test_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.released.bridge, "_INTERFACE", ("shard_tensor",))
    with pytest.raises(UsageError, match="it calls styles in an unknown way"):
        register_styles()


def test_a_torch_that_calls_packed_placements_plain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.9.1 does, where `_StridedShard` is a `Shard`: gate_up_proj would be loaded in two plain halves."""

    class Plain:
        def __init__(self, dim: int, *, split_factor: int) -> None: ...

        def is_shard(self) -> bool:
            return True

    monkeypatch.setattr(runtime.released.bridge, "_StridedShard", Plain)
    with pytest.raises(UsageError, match="load gate_up_proj into the wrong rows"):
        register_styles()
