"""Numbered states of optimizers that FSDP jobs pickle: named by order and shapes, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plans.errors import ConversionError, HeaderError, IncompleteError, MigratorError, MismatchError
from plans.mesh import Mesh
from runtime.checkpoint.fsdp.parameter_order import match_parameters
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder
from tests.runtime.checkpoint.fsdp import fsdp_jobs
from tests.runtime.rank_pool import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DCP = ReshardTarget("dcp", Mesh(fsdp=2))


@pytest.fixture(scope="module")
def job(two_ranks: RankPool, hub_folder: HubFolder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from how a job groups its parameters to what it saved, the true states beside it."""
    folders: dict[str, Path] = {}

    def saved(how: str) -> Path:
        if how not in folders:
            folder = folders[how] = tmp_path_factory.mktemp("job") / "actor"
            folder.mkdir()
            two_ranks.run(fsdp_jobs.save_optimizer, hub_folder("qwen2"), folder, how)
            shutil.copy(hub_folder("qwen2") / "config.json", folder)
        return folders[how]

    return saved


@pytest.mark.parametrize("how", ["one group", "decay apart", "one frozen"])
def test_states_get_the_names_of_their_parameters(how: str, job: Callable[[str], Path], tmp_path: Path) -> None:
    """The oracle is torch, which named the same optimizer's states while the job ran."""
    execute_reshard(plan_reshard(job(how), target=DCP), tmp_path / "dcp")
    expected = torch.load(job(how).parent / "expected.pt", weights_only=True)
    optimizer = open_checkpoint(tmp_path / "dcp").read_headers(optimizer="require").optimizer
    assert optimizer is not None
    assert {*optimizer.tensors, *optimizer.values} == {f"optimizer.{name}" for name in expected}
    state = {name: torch.empty_like(value) for name, value in expected.items() if isinstance(value, torch.Tensor)}
    import torch.distributed.checkpoint as dcp

    loaded = {"optimizer": {**{name: value for name, value in expected.items() if name not in state}, **state}}
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert [name for name in state if not torch.equal(loaded["optimizer"][name], expected[name])] == []
    assert [n for n, value in expected.items() if n not in state and loaded["optimizer"][n] != value] == []


def edit(folder: Path, rank: int, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / f"optim_world_size_2_rank_{rank}.pt"
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def edit_all(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: [edit(folder, rank, change) for rank in range(2)] and None


def drop_one(state: dict[str, Any]) -> None:
    """Let one of two neighbours of one shape, such as gate and up, be frozen, without a trace of which."""
    numbers, rows = state["param_groups"][0]["params"], state["state"]
    shapes = [rows[number]["exp_avg"].shape for number in numbers]
    frozen = numbers.pop(next(place for place in numbers[1:] if shapes[place] == shapes[place - 1]))
    rows.pop(frozen)


def swap(state: dict[str, Any]) -> None:
    rows = state["state"]
    rows[0], rows[1] = rows[1], rows[0]


def hide(state: dict[str, Any]) -> None:
    state["param_groups"][0]["lr"] = Path("x")


WITHOUT = "leave the optimizer out with `optimizer=False`"
DAMAGE: dict[str, tuple[Callable[[Path], object], type[MigratorError], str, str]] = {
    "one of several is frozen": (edit_all(drop_one), ConversionError, "more than one order", WITHOUT),
    "in another order": (edit_all(swap), ConversionError, "not those of the model's", WITHOUT),
    "a missing rank": (
        lambda folder: (folder / "optim_world_size_2_rank_1.pt").unlink(), IncompleteError, "1 of 2 ranks", "copy the"
    ),
    "another rank's": (
        lambda folder: shutil.copy(
            folder / "optim_world_size_2_rank_0.pt", folder / "optim_world_size_2_rank_1.pt"
        ), MismatchError, "not hold the shards of rank 1", "the files belong to several"
    ),
    "of another step": (
        lambda folder: edit(folder, 1, lambda state: state["state"][0]["step"].add_(1)), MismatchError,
        "with other values", "the files belong to several checkpoints"
    ),
    "other settings": (
        lambda folder: edit(folder, 1, lambda state: state["param_groups"][0].update(lr=7.0)), MismatchError,
        "laid out otherwise", "the files belong to several checkpoints"
    ),
    "a hyperparameter that is an object": (edit_all(hide), HeaderError, "no plain data", WITHOUT),
    "no groups": (edit_all(lambda state: state.pop("param_groups")), HeaderError, "no groups of parameters", WITHOUT),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_what_no_order_explains_is_refused(case: str, job: Callable[[str], Path], tmp_path: Path) -> None:
    change, error, words, hint = DAMAGE[case]
    folder = Path(shutil.copytree(job("one group"), tmp_path / "damaged"))
    change(folder)
    with pytest.raises(error, match=words) as caught:
        plan_reshard(folder, target=DCP)
    assert "\n" not in caught.value.message
    assert caught.value.hint.startswith(hint)
    # Without the optimizer, as the hint says, it is read.
    assert plan_reshard(folder, target=ReshardTarget("hf")).checkpoint.optimizer is None


def test_an_adapter_is_named_as_such(job: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(job("one group"), tmp_path / "actor"))
    (folder / "lora_adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "lora_adapter" / name).write_text("{}")
    left = {left.name: left.reason for left in open_checkpoint(folder).read_headers().side_files.left_behind}
    assert left["lora_adapter/adapter_config.json"] == "a PEFT adapter, which is not merged"
    assert left["lora_adapter/adapter_model.safetensors"] == "a PEFT adapter, which is not merged"


def test_a_model_with_an_adapter_inside_is_refused(job: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(job("one group"), tmp_path / "actor"))
    for path in folder.glob("model_world*.pt"):
        state = torch.load(path, weights_only=False)
        wrapped = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        q = "base_model.model.model.layers.0.self_attn.q_proj"
        wrapped[f"{q}.base_layer.weight"] = wrapped.pop(f"{q}.weight")
        wrapped |= {f"{q}.lora_A.default.weight": torch.zeros(2, 32), f"{q}.lora_B.default.weight": torch.zeros(32, 2)}
        torch.save(wrapped, path)
    with pytest.raises(IncompleteError, match="beside a PEFT adapter, 2 tensors such as") as caught:
        plan_reshard(folder, target=ReshardTarget("hf"))
    assert caught.value.hint == "merge the adapter before saving: `model = model.merge_and_unload()`"


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=7),
    st.lists(st.integers(0, 2), min_size=7, max_size=7),
    st.integers(0, 6),
)
def test_ways_are_those_that_trying_all_finds(sizes: list[int], owners: list[int], hidden: int) -> None:
    """Some parameters are frozen (owner 2), the others in two groups; one may have no state."""
    parameters = {f"p{number}": (size,) for number, size in enumerate(sizes)}
    groups = [
        [None if number == hidden else (size,) for number, size in enumerate(sizes) if owners[number] == group]
        for group in range(2)
    ]
    expected = list(try_all(groups, list(parameters.items())))
    found = match_parameters(groups, parameters)
    assert found is not None
    assert len(found) == min(2, len(expected))
    assert all(way in expected for way in found)
    assert len(found) < 2 or found[0] != found[1]


def try_all(groups: list[Any], parameters: list[tuple[str, tuple[int]]]) -> Any:
    def fits(shapes: Any, rows: Any) -> bool:
        return all(shape in (None, row[1]) for shape, row in zip(shapes, rows, strict=True))

    for first in combinations(range(len(parameters)), len(groups[0])):
        if not fits(groups[0], [parameters[index] for index in first]):
            continue
        rest = [index for index in range(len(parameters)) if index not in first]
        for second in combinations(rest, len(groups[1])):
            if fits(groups[1], [parameters[index] for index in second]):
                yield [[parameters[index][0] for index in chosen] for chosen in (first, second)]
