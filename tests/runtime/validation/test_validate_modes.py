"""Sound checkpoints of every layout validated in every mode: all five parts are right on real gloo ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from plans.mesh import Mesh, Mode
from runtime.checkpoint.checkpoint import Layout
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.validation.results import PARTS
from tests.runtime.checkpoint.hub.test_orientation import EXPERTS, qwen3_vl_moe, save_experts
from tests.runtime.rank_pool import RankPool
from tests.runtime.validation import validation_cases
from tests.tiny_models import MODELS, tiny_config, tiny_model, with_noise

HubFolder = Callable[[str], Path]
LaidOut = Callable[[Path, Layout, Mesh, Mode], Path]

WAYS: tuple[tuple[Mode, Mesh], ...] = (
    ("tp", Mesh(tp=2)),
    ("ep", Mesh(tp=2, ep=2)),
    ("tp_ep", Mesh(tp=2, ep=2)),
    ("sp", Mesh(tp=2)),
    ("sp_ep", Mesh(tp=2, ep=2)),
    ("tp", Mesh(fsdp=2)),
    ("tp", Mesh(tp=2, fsdp=2)),
    ("tp_ep", Mesh(tp=2, ep=4, fsdp=2)),
    ("ep", Mesh(tp=4, ep=4)),
    ("sp", Mesh(tp=2, fsdp=2)),
    ("sp_ep", Mesh(tp=4, ep=4)),
)
LAYOUTS: tuple[Layout, ...] = ("ranks", "dcp", "hf")
DENSE = ("llama", "qwen2")


def rows() -> Iterator[object]:
    """Yield every model in every mode and layout; by default each model runs one, and each mode one at least."""
    for number, name in enumerate(MODELS):
        ways = [way for way in WAYS if name not in DENSE or "ep" not in way[0]]
        chosen = number % len(ways)
        for place, (mode, mesh) in enumerate(ways):
            for turn, layout in enumerate(LAYOUTS):
                always = place == chosen and turn == number % len(LAYOUTS)
                marks = () if always else pytest.mark.full
                yield pytest.param(name, mode, mesh, layout, marks=marks, id=f"{name}-{mode}-{mesh}-{layout}")


@pytest.mark.parametrize(("name", "mode", "mesh", "layout"), list(rows()))
def test_all_parts_of_a_sound_checkpoint_are_right(
    name: str, mode: Mode, mesh: Mesh, layout: Layout, hub_folder: HubFolder, laid_out: LaidOut, pool: Pool
) -> None:
    folder = laid_out(hub_folder(name), layout, mesh, mode)
    results = pool(mesh).run(validation_cases.validate, folder, None, mesh, mode)
    assert results[1:] == results[:-1]
    found = results[0]
    assert found["ok"], found
    skipped = {"generation"} if mode.startswith("sp") else set()
    assert found["skipped"].keys() == skipped
    assert all(found[part]["ok"] for part in PARTS if part not in skipped)
    assert min(found[part]["checked"] for part in PARTS if part not in skipped) > 10
    assert found["content"]["against"] == ("source" if layout == "hf" else "manifest")
    reading = (
        "transformers" if layout == "hf" else f"migrator alone, because transformers does not read the layout {layout}"
    )
    assert found["forward"]["reference_read_by"] == reading
    assert found["content"]["copies"] > found["content"]["checked"] or mesh.tp == 1
    assert found["structure"]["bytes_per_rank"] == found["structure"]["bytes_planned"]
    assert found["backward"]["max_abs_reference"] > 1e-3


@pytest.mark.parametrize(("hidden", "intermediate", "square"), [(32, 16, "gate_up_proj"), (32, 32, "down_proj")])
def test_square_experts_that_transformers_misreads_are_no_fault_of_the_checkpoint(
    hidden: int, intermediate: int, square: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    config = qwen3_vl_moe(hidden, intermediate)
    state = with_noise(transformers.Qwen3VLMoeForConditionalGeneration(config)).state_dict()
    source = save_experts(config, state, tmp_path / "hub", transposed=True)
    misread = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(source).state_dict()
    assert [name for name in state if not torch.equal(state[name], misread[name])] == [f"{EXPERTS}.{square}"]
    found = two_ranks.run(validation_cases.validate, source, None, Mesh(tp=2), "tp")[0]
    assert found["forward"]["ok"], found
    assert found["content"]["ok"], found
    reading = f"transformers; '{EXPERTS}.{square}' transposed, as those beside them are"
    assert found["forward"]["reference_read_by"] == reading


@pytest.mark.parametrize(("mode", "mesh"), [("tp", Mesh(tp=2)), ("tp_ep", Mesh(tp=2, ep=2))], ids=str)
def test_the_checkpoints_own_type_is_compared_too(
    mode: Mode, mesh: Mesh, rounded_hub: Path, laid_out: LaidOut, pool: Pool
) -> None:
    folder = laid_out(rounded_hub, "ranks", mesh, mode)
    found = pool(mesh).run(validation_cases.validate, folder, rounded_hub, mesh, mode)[0]
    assert found["ok"], found
    stored = found["forward"]["as_stored"]
    assert stored["dtype"] == "BF16"
    assert 0 < stored["unsharded_error"] < 0.1 * found["forward"]["max_abs_reference"]
    assert found["forward"]["max_abs_diff"] < 1e-5 * found["forward"]["max_abs_reference"]


def test_models_in_both_types_never_take_memory_at_once(
    rounded_hub: Path, laid_out: LaidOut, two_ranks: RankPool
) -> None:
    folder = laid_out(rounded_hub, "ranks", Mesh(tp=2), "tp")
    assert two_ranks.run(validation_cases.forgets_before_it_widens, folder) == [True, True]


def test_what_is_wrong_in_the_checkpoints_own_type_alone_is_found(
    rounded_hub: Path, laid_out: LaidOut, two_ranks: RankPool
) -> None:
    folder = laid_out(rounded_hub, "ranks", Mesh(tp=2), "tp")
    found = two_ranks.run(validation_cases.with_style, "coarse", "moe_tp_experts", folder)[0]
    assert not found["ok"]
    assert {row["name"] for row in found["forward"]["mismatches"]} == {"logits in BF16"}
    assert found["backward"]["ok"]


def test_several_types_are_compared_in_float32_alone(
    hub_folder: HubFolder, tmp_path: Path, laid_out: LaidOut, two_ranks: RankPool
) -> None:
    model = tiny_model(tiny_config("olmoe")).to(torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(tmp_path / "hub")
    folder = laid_out(tmp_path / "hub", "dcp", Mesh(tp=2), "tp")
    found = two_ranks.run(validation_cases.validate, folder)[0]
    assert found["ok"], found
    assert found["skipped"] == {"forward as stored": "parameters are stored as BF16, F32"}


@pytest.mark.parametrize(("mode", "mesh"), [("tp", Mesh(tp=2)), ("tp_ep", Mesh(tp=4, ep=4))], ids=str)
def test_a_reference_without_room_on_one_rank_is_spread_over_all(
    mode: Mode, mesh: Mesh, hub_folder: HubFolder, laid_out: LaidOut, pool: Pool
) -> None:
    folder = laid_out(hub_folder("qwen3_moe"), "ranks", mesh, mode)
    found = pool(mesh).run(validation_cases.without_room, folder, mesh, mode)[0]
    assert found["ok"], found
    assert found["forward"]["against"] == f"the model over fsdp={mesh.world_size}"


Pool = Callable[[Mesh], RankPool]


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Pool:
    """Return a function from a mesh to as many ranks."""

    def ranks(mesh: Mesh) -> RankPool:
        found: Any = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[mesh.world_size])
        return found

    return ranks


@pytest.fixture
def laid_out(tmp_path: Path) -> LaidOut:
    """Return a function that brings hub form to a layout, and leaves it where it is asked for."""

    def folder(hub: Path, layout: Layout, mesh: Mesh, mode: Mode) -> Path:
        if layout == "hf":
            return hub
        execute_reshard(plan_reshard(hub, target=ReshardTarget(layout, mesh, mode)), tmp_path / layout)
        return tmp_path / layout

    return folder


@pytest.fixture(scope="module")
def rounded_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("rounded") / "hub"
    tiny_model(tiny_config("qwen3_moe")).to(torch.bfloat16).save_pretrained(folder)
    return folder
