"""Every style compared with the plain module, forward and backward, with sizes that do not divide too."""

from __future__ import annotations

import pytest

from plans.dialect import PARAM_LEVEL, dialect_for_release, load_dialect
from plans.errors import PlanError, UnknownStyleError
from plans.placement import Packed, Placement, Replicate, Shard
from runtime.styles import STYLES, ParallelStyle
from runtime.styles.placements import from_torch, to_torch
from runtime.styles.style import shard_parameter
from tests.runtime.rank_pool import RankPool
from tests.runtime.styles import style_cases

_COLWISE = {"weight": Shard(0), "bias": Shard(0)}
_ROWWISE = {"weight": Shard(1)}
_UNEVEN, _EVEN = (10, 7), (10, 8)

_CASES: list[tuple[str, str, tuple[int, ...], dict[str, Placement]]] = [
    ("colwise", "linear", _UNEVEN, _COLWISE),
    ("colwise_gather_output", "linear", _UNEVEN, _COLWISE),
    ("colwise_rep", "linear", (10, 5), _COLWISE),
    ("colwise_allgather", "linear", _EVEN, _COLWISE),
    ("rowwise", "linear", _EVEN, _ROWWISE),
    ("rowwise", "linear", (7, 3), _ROWWISE),
    ("rowwise_allreduce", "linear", (9, 4), _ROWWISE),
    ("rowwise_split_input", "linear", (7, 3), _ROWWISE),
    ("rowwise_rep", "linear", _EVEN, _ROWWISE),
    ("embedding_rowwise", "embedding", (11, 6), {"weight": Shard(0)}),
    ("embedding_rowwise", "embedding", (5, 6), {"weight": Shard(0)}),
    ("embedding_colwise", "embedding", (11, 7), {"weight": Shard(1)}),
]


@pytest.mark.parametrize(("style", "kind", "sizes", "places"), _CASES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_output_and_gradients_equal_the_plain_module(
    style: str,
    kind: str,
    sizes: tuple[int, ...],
    places: dict[str, Placement],
    world_size: int,
    request: pytest.FixtureRequest,
) -> None:
    pool: RankPool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world_size])
    for errors in pool.run(style_cases.style_errors, style, kind, sizes, places):
        assert {"output", "weight"} <= errors.keys()
        assert max(errors.values()) < 1e-5, errors


def test_packed_colwise_keeps_both_groups_of_a_linear(two_ranks: RankPool) -> None:
    for errors in two_ranks.run(style_cases.packed_errors):
        assert errors.keys() == {"output", "input gradient", "weight"}
        assert max(errors.values()) < 1e-5, errors


def test_the_padding_token_gets_no_gradient_on_any_rank(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(style_cases.padding_gradient)
    assert first == [1.0, 1.0, 1.0]
    assert second == [0.0, 1.0]


def test_a_whole_parameter_used_by_each_ranks_heads_gets_summed_gradients_that_accumulate(
    two_ranks: RankPool,
) -> None:
    first, second = two_ranks.run(style_cases.partial_norm_gradients)
    assert first == second
    assert first["first pass"] < 1e-6
    assert first["accumulated"] < 1e-6


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no out_features", "has no out_features"),
        ("whole weight", r"weight is Replicate, but this style needs Shard\(0\)"),
        ("wrong dim", r"weight is Shard\(0\), but this style needs Shard\(1\)"),
        ("whole bias", "bias is not sharded"),
        ("sharded bias", "bias is sharded"),
        ("not an embedding", "is not an embedding"),
        ("whole experts", "output would be multiplied by 2"),
        ("whole expert bias", "down_proj_bias would be added 2 times"),
        ("packed bias", "bias is not packed"),
        ("no hook", "no plan entry hooks part"),
        ("whole output", "output would be multiplied by 2"),
        ("no identity", "is not an nn.Identity"),
        ("container", "has no forward of its own"),
    ],
)
def test_a_module_that_a_style_cannot_hook_is_refused(kind: str, message: str, two_ranks: RankPool) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        two_ranks.run(style_cases.refuse_module, kind)
    assert "part" in caught.value.message
    assert caught.value.hint


def test_an_unknown_style_is_refused_by_name(two_ranks: RankPool) -> None:
    with pytest.raises(UnknownStyleError, match="'part': the style 'megamoe_experts' cannot run here"):
        two_ranks.run(style_cases.refuse_module, "unknown style")


def test_registering_returns_a_new_registry_and_leaves_the_old_one_unchanged() -> None:
    extended = STYLES.register(ParallelStyle("mine"))
    assert extended.style("mine", "layers.*.mlp").name == "mine"
    assert set(extended.names) == {*STYLES.names, "mine"}
    with pytest.raises(UnknownStyleError, match=r"'layers\.\*\.mlp': the style 'mine'") as caught:
        STYLES.style("mine", "layers.*.mlp")
    assert "colwise" in caught.value.hint


def test_the_experts_hook_shards_nothing_and_the_expert_parameters_hook_nothing() -> None:
    dialect = load_dialect(PARAM_LEVEL)
    assert dialect.styles["moe_experts_allreduce"].rules == ()
    assert STYLES.styles["moe_experts_allreduce"].around is not None
    for name, place in (("moe_tp_gate_up_colwise", Packed(1, 2)), ("moe_tp_down_rowwise", Shard(2))):
        assert STYLES.styles[name] == ParallelStyle(name, around=None, shard=shard_parameter)
        assert dialect.styles[name].placement("module", 3, "weight") == place


def test_every_style_of_every_supported_release_can_run_or_is_listed_as_missing() -> None:
    fused_kernels = {"megamoe_router", "megamoe_experts"}
    releases = {dialect_for_release(f"5.{minor}.0").name for minor in range(17, 24)}
    assert len(releases) > 3
    for name in (*releases, PARAM_LEVEL):
        assert set(load_dialect(name).styles) - set(STYLES.names) <= fused_kernels, name


@pytest.mark.parametrize("style", ["moe_experts_allreduce", "moe_tp_experts", "all_reduce"])
def test_partial_outputs_are_summed_and_so_are_the_inputs_gradients(style: str, two_ranks: RankPool) -> None:
    for errors in two_ranks.run(style_cases.mixer_errors, style):
        assert errors.keys() == {"output", "inputs", "scale", "up", "down"}
        assert max(errors.values()) < 1e-5, errors


def test_an_identity_expert_is_counted_once(four_ranks: RankPool) -> None:
    for errors in four_ranks.run(style_cases.identity_errors):
        assert errors.keys() == {"output", "inputs"}
        assert max(errors.values()) < 1e-5, errors


def test_a_bare_parameter_is_seen_locally_by_its_owner(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(style_cases.bare_parameter)
    assert first == ([10.0, 11.0], [1.0, 1.0], "Shard(0)")
    assert second == ([12.0], [1.0], "Shard(0)")


def test_placements_survive_a_round_trip_through_torch() -> None:
    for placement in (Replicate(), Shard(0), Shard(2), Packed(1, 2)):
        assert from_torch(to_torch(placement)) == placement
