"""Optimizers' state that torch wrote: laid out like the parameters, the same values in every layout, or refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from plans.errors import (
    CheckpointError,
    ConversionError,
    HeaderError,
    IncompleteError,
    MigratorError,
    MismatchError,
    UsageError,
)
from plans.mesh import Mesh
from runtime.checkpoint.checkpoint import Layout
from runtime.checkpoint.copying.copy import plan_units
from runtime.checkpoint.files.file_names import MANIFEST, METADATA
from runtime.checkpoint.resharding.execute import ReshardOptions, execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import ReshardPlan, plan_reshard
from runtime.checkpoint.verifying.verify import verify
from tests.conftest import HubFolder
from tests.runtime.checkpoint.dcp.test_metadata import Evil, edit
from tests.runtime.checkpoint.resharding.killed_runs import SMALL, kill_halfway
from tests.runtime.checkpoint.resharding.test_crash import files
from tests.runtime.checkpoint.resharding.test_layouts import walk

Trained = Callable[..., Path]
Values = dict[str, Any]

DISTCP = "__0_0.distcp"
STATE, GROUPS = "optimizer.state.", "optimizer.param_groups."
GATE_UP, Q = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"

DENSE = [
    ReshardTarget("dcp", Mesh(tp=2)),
    ReshardTarget("ranks", Mesh(tp=2, fsdp=2)),
    ReshardTarget("dcp", Mesh(fsdp=3)),
    ReshardTarget("hf", optimizer=True),
    ReshardTarget("dcp", Mesh(tp=4, fsdp=2)),
    ReshardTarget("dcp", Mesh(tp=2, replicate=2)),
    ReshardTarget("ranks", Mesh(tp=2, pp=2)),
]
EXPERTS = [
    ReshardTarget("dcp", Mesh(tp=2, ep=4, fsdp=2), "tp_ep"),
    ReshardTarget("ranks", Mesh(tp=4, ep=4), "ep"),
    ReshardTarget("dcp", Mesh(tp=2, ep=2, fsdp=4), "sp_ep"),
]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, amsgrad=True),
    "tensor lr": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(1e-3), capturable=False),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "groups": lambda parameters: torch.optim.AdamW(
        [{"params": [one], "weight_decay": 0.1 * one.ndim} for one in parameters]
    ),
}


@pytest.fixture(scope="module")
def trained(hub_folder: HubFolder, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a function from a model's name and an optimizer's to a folder with both, trained a little."""
    folders: dict[tuple[str, str], Path] = {}

    def made(name: str = "qwen3_moe", optimizer: str = "adamw") -> Path:
        if (name, optimizer) not in folders:
            folder = shutil.copytree(hub_folder(name), tmp_path_factory.mktemp("trained") / "hub")
            folders[name, optimizer] = with_state(Path(folder), OPTIMIZERS[optimizer])
        return folders[name, optimizer]

    return made


def with_state(
    folder: Path,
    made: Callable[[Any], torch.optim.Optimizer],
    *,
    place: str = ".",
    flat: bool = True,
    change: Callable[[Values], object] = lambda state: None,
) -> Path:
    """Train a checkpoint's model for a step, and save the optimizer's state beside it as transformers does."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    optimizer = made(model.parameters())
    tokens = torch.arange(32).reshape(2, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state: Values = dict(get_optimizer_state_dict(model, optimizer, options=options))
    change(state)
    with warnings.catch_warnings(action="ignore"):
        dcp.save({"optimizer": state}, checkpoint_id=folder / place, no_dist=True)
    return folder


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS["adamw"](parameters)


@pytest.fixture
def folder(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained(), tmp_path / "source"))


def values_of(folder: Path) -> Values:
    """Return what torch reads of an optimizer's checkpoint."""
    with warnings.catch_warnings(action="ignore"):
        dcp_to_torch_save(folder, folder.parent / "values")
    state = torch.load(folder.parent / "values", weights_only=True)["optimizer"]
    return dict(flattened(state, ""))


def flattened(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flattened(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def assert_equal(one: Values, other: Values) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not same(one[name], other[name])] == []


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other


def metadata_of(folder: Path) -> Any:
    return pickle.loads((folder / METADATA).read_bytes())


@pytest.mark.parametrize(
    ("name", "optimizer", "targets"),
    [
        ("qwen3_moe", "adamw", [DENSE[0], DENSE[1], DENSE[3], EXPERTS[0]]),
        *(pytest.param("qwen3_moe", optimizer, [*DENSE, *EXPERTS], marks=pytest.mark.full) for optimizer in OPTIMIZERS),
        *(pytest.param("llama", optimizer, DENSE, marks=pytest.mark.full) for optimizer in OPTIMIZERS),
    ],
)
def test_torch_reads_the_same_values_from_every_layout(
    name: str, optimizer: str, targets: list[ReshardTarget], trained: Trained, tmp_path: Path
) -> None:
    source = trained(name, optimizer)
    folders = walk(source, [*targets, targets[0]], tmp_path / "walk")
    expected = values_of(Path(shutil.copytree(source, tmp_path / "source")))
    assert any(torch.is_tensor(value) and bool(value.any()) for value in expected.values())
    for folder in folders[1:]:
        assert_equal(values_of(folder), expected)
    names = [path.name for path in folders[1].iterdir()]
    assert [file for file in names if (folders[1] / file).read_bytes() != (folders[-1] / file).read_bytes()] == []


def test_states_lie_like_their_parameters(folder: Path, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(folder, target=ReshardTarget("dcp", Mesh(tp=2, fsdp=2))), tmp_path / "out")
    metadata = metadata_of(tmp_path / "out")
    boxes: dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = {}
    for name in (f"{STATE}{GATE_UP}.exp_avg", f"{STATE}{Q}.exp_avg_sq", f"{STATE}{Q}.step", f"{STATE}{NORM}.exp_avg"):
        for chunk in metadata.state_dict_metadata[name].chunks:
            place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            boxes.setdefault(name, []).append((place.relative_path, tuple(chunk.offsets), tuple(chunk.sizes)))
    file = "__{}_0.distcp".format
    # Rank 2 * fsdp + tp holds, of its half of the experts, its rows of gate and its rows of up.
    assert boxes[f"{STATE}{GATE_UP}.exp_avg"] == [
        (file(2 * fsdp + tp), (4 * fsdp, 16 * group + 8 * tp, 0), (4, 8, 32))
        for fsdp in range(2)
        for tp in range(2)
        for group in range(2)
    ]
    # The innermost axis is applied first: rows by tp, then by fsdp.
    assert boxes[f"{STATE}{Q}.exp_avg_sq"] == [
        (file(2 * fsdp + tp), (16 * tp + 8 * fsdp, 0), (8, 32)) for fsdp in range(2) for tp in range(2)
    ]
    assert boxes[f"{STATE}{NORM}.exp_avg"] == [(file(0), (0,), (16,)), (file(2), (16,), (16,))]
    assert boxes[f"{STATE}{Q}.step"] == [(file(0), (), ())]


def test_a_result_in_hub_form_leaves_the_state_behind_unless_asked(folder: Path, tmp_path: Path) -> None:
    hub = plan_reshard(folder, target=ReshardTarget("hf"))
    assert [left for left in hub.checkpoint.side_files.left_behind if "--optimizer" in left.reason]
    execute_reshard(hub, tmp_path / "hub")
    assert not (tmp_path / "hub" / METADATA).exists()
    assert not (tmp_path / "hub" / DISTCP).exists()
    execute_reshard(plan_reshard(folder, target=ReshardTarget("hf", optimizer=True)), tmp_path / "with")
    assert {chunk.relative_path for chunk in metadata_of(tmp_path / "with").storage_data.values()} == {DISTCP}
    execute_reshard(
        plan_reshard(folder, target=ReshardTarget("dcp", Mesh(tp=2), optimizer=False)), tmp_path / "without"
    )
    assert not list((tmp_path / "without").glob("*.distcp"))
    with pytest.raises(
        IncompleteError,
        match=r"(?s)no optimizer's state.*hint: save it there with save_optimizer_distributed, or leave",
    ):
        plan_reshard(tmp_path / "without", target=ReshardTarget("hf", optimizer=True))


@pytest.mark.parametrize("place", [".", "optimizer", "state/optimizer_0"])
def test_the_state_is_found_where_it_is_and_stays_there(place: str, hub_folder: HubFolder, tmp_path: Path) -> None:
    source = Path(shutil.copytree(hub_folder("llama"), tmp_path / "source"))
    with_state(source, adamw, place=place)
    for file in ("__7_0.distcp", "__1_0.distcp"):  # left by an earlier save, one where ours would be
        (source / place / file).write_bytes(b"stale")
    plan = plan_reshard(source, target=DENSE[0])
    execute_reshard(plan, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / place).glob("*.distcp")) == [DISTCP, "__1_0.distcp"]
    assert {left.name for left in plan.checkpoint.side_files.left_behind if left.name.endswith(".distcp")} == {
        str(Path(place) / "__7_0.distcp"),
        str(Path(place) / "__1_0.distcp"),
    }
    assert_equal(values_of(tmp_path / "out" / place), values_of(source / place))


def test_groups_by_number_and_frozen_parameters_are_kept(hub_folder: HubFolder, tmp_path: Path) -> None:
    def without_embedding(parameters: Any) -> torch.optim.Optimizer:
        frozen, *others = parameters
        frozen.requires_grad = False
        return torch.optim.AdamW([{"params": others}, {"params": [frozen], "lr": 0.5}])

    source = Path(shutil.copytree(hub_folder("qwen2"), tmp_path / "source"))
    with_state(source, without_embedding, flat=False)
    plan = plan_reshard(source, target=DENSE[1])
    assert plan.checkpoint.optimizer is not None
    assert plan.checkpoint.optimizer.stateless == ("model.embed_tokens.weight",)
    execute_reshard(plan, tmp_path / "out")
    values = values_of(tmp_path / "out")
    assert values["param_groups.1.lr"] == 0.5
    assert_equal(values, values_of(source))


def test_the_manifest_guards_the_state(folder: Path, trained: Trained, tmp_path: Path) -> None:
    (_, out) = walk(folder, [DENSE[0]], tmp_path / "walk")
    digests = json.loads((out / MANIFEST).read_text())["optimizer"]
    assert digests.keys() == {n for n, e in metadata_of(out).state_dict_metadata.items() if hasattr(e, "chunks")}
    place = metadata_of(out).storage_data[MetadataIndex(f"{STATE}{GATE_UP}.exp_avg", (0, 0, 0))]
    file = out / place.relative_path
    damaged = bytearray(file.read_bytes())
    damaged[place.offset + 1000] ^= 64
    file.write_bytes(damaged)
    plan = plan_reshard(out, target=DENSE[1])
    with pytest.raises(MismatchError, match="match the digests in the manifest") as caught:
        execute_reshard(plan, tmp_path / "again")
    assert caught.value.data["tensors"] == [f"{STATE}{GATE_UP}.exp_avg"]
    (out / "__1_0.distcp").unlink()
    for other in (METADATA, DISTCP):
        shutil.copy(trained("qwen3_moe", "sgd") / other, out / other)
    with pytest.raises(MismatchError, match="the manifest and the optimizer's files differ"):
        plan_reshard(out, target=DENSE[1])


@pytest.mark.parametrize("layout", ["dcp", "ranks"])
def test_a_state_that_the_manifest_records_must_be_there(
    layout: Layout, folder: Path, trained: Trained, tmp_path: Path
) -> None:
    execute_reshard(plan_reshard(folder, target=ReshardTarget(layout, Mesh(tp=2))), tmp_path / "out")
    assert verify(tmp_path / "out", folder).ok
    for file in (METADATA, DISTCP, "__1_0.distcp"):
        (tmp_path / "out" / file).unlink()
    for target in (ReshardTarget("dcp", Mesh(tp=4)), ReshardTarget("hf", optimizer=True)):
        with pytest.raises(
            IncompleteError, match=r"the optimizer's state is missing, but migrator\.json records '"
        ) as caught:
            plan_reshard(tmp_path / "out", target=target)
        assert "`optimizer=False`" in caught.value.hint
    with pytest.raises(
        IncompleteError, match=r"(?s)state is missing.*hint: copy its files again, or leave the state out"
    ):
        verify(tmp_path / "out")
    execute_reshard(
        plan_reshard(tmp_path / "out", target=ReshardTarget("dcp", Mesh(tp=4), optimizer=False)), tmp_path / "without"
    )
    (difference,) = verify(tmp_path / "without", folder).differences
    assert (difference.name, difference.aspect) == ("the optimizer's state", "missing")
    assert (difference.expected, difference.found) == ("held", "not held")


def without(folder: Path, *names: str, listed: bool = False) -> None:
    def drop(metadata: Any) -> None:
        for name in names:
            del metadata.state_dict_metadata[name]
            if not listed:
                del metadata.planner_data[name]

    edit(folder, drop)


def test_missing_states_are_named(folder: Path) -> None:
    without(folder, f"{STATE}{Q}.exp_avg_sq", listed=True)
    with pytest.raises(IncompleteError, match=f"'{STATE}{Q}.exp_avg_sq' missing"):
        plan_reshard(folder, target=DENSE[0])


def test_a_state_that_only_others_have_is_missing(folder: Path) -> None:
    without(folder, f"{STATE}{Q}.exp_avg_sq", f"{STATE}{NORM}.step")
    with pytest.raises(
        IncompleteError,
        match=r"(?s)the optimizer's state is incomplete.*hint: the files are damaged or of several checkpoints; "
        "save the optimizer again into an empty folder",
    ) as caught:
        plan_reshard(folder, target=DENSE[0])
    assert caught.value.data["missing"] == [f"exp_avg_sq of {Q}", f"step of {NORM}"]


def test_a_lost_file_and_a_lost_chunk_are_named(folder: Path, tmp_path: Path) -> None:
    (_, out) = walk(folder, [DENSE[0]], tmp_path / "walk")
    name = f"{STATE}{Q}.exp_avg"
    edit(out, lambda metadata: metadata.state_dict_metadata[name].chunks.pop())
    with pytest.raises(IncompleteError, match=f"lossy: '{name}' not whole"):
        plan_reshard(out, target=DENSE[1])
    (out / "__1_0.distcp").unlink()
    with pytest.raises(IncompleteError, match=r"__1_0.distcp: missing"):
        plan_reshard(out, target=DENSE[1])
    os.truncate(folder / DISTCP, 1000)
    with pytest.raises(IncompleteError, match="truncated"):
        plan_reshard(folder, target=DENSE[0])


def test_the_state_of_another_model_is_refused(folder: Path, trained: Trained, tmp_path: Path) -> None:
    for file in (METADATA, DISTCP):
        shutil.copy(trained("llama", "adamw") / file, folder / file)
    with pytest.raises(MismatchError, match="belong to no parameter of the model"):
        plan_reshard(folder, target=DENSE[0])


def test_the_state_of_a_model_of_another_size_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    other = transformers.AutoConfig.for_model(**config | {"vocab_size": 53})
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    transformers.AutoModelForCausalLM.from_config(other).save_pretrained(folder)
    with pytest.raises(ConversionError, match=r"exp_avg is \[101, 32\].* as its parameter, \[53, 32\]"):
        plan_reshard(folder, target=DENSE[0])


def test_states_of_a_shape_of_their_own_are_refused_by_name(hub_folder: HubFolder, tmp_path: Path) -> None:
    source = Path(shutil.copytree(hub_folder("llama"), tmp_path / "source"))
    with_state(source, lambda parameters: torch.optim.Adafactor(parameters))
    with pytest.raises(ConversionError, match=r"row_var is \[.*neither one element nor as large") as caught:
        plan_reshard(source, target=DENSE[0])
    assert "`optimizer=False`" in caught.value.hint
    execute_reshard(plan_reshard(source, target=ReshardTarget("dcp", Mesh(tp=2), optimizer=False)), tmp_path / "out")


def test_the_states_of_two_optimizers_are_refused(folder: Path) -> None:
    (folder / "old").mkdir()
    for file in (METADATA, DISTCP):
        shutil.copy(folder / file, folder / "old" / file)
    with pytest.raises(
        CheckpointError, match=r"(?s)several optimizers, in '\.', 'old'.*hint: keep the one that belongs to the weights"
    ):
        plan_reshard(folder, target=DENSE[0])


def test_nothing_in_a_hyperparameter_is_run_or_handed_on(folder: Path, tmp_path: Path) -> None:
    def poisoned(state: Values) -> None:
        state[f"param_groups.{Q}.eps"] = Evil(tmp_path / "mark")

    with_state(folder, adamw, change=poisoned)
    with pytest.raises(HeaderError, match=rf"{GROUPS}{Q}\.eps.*names 'posix\.system'"):
        plan_reshard(folder, target=DENSE[0])
    assert not (tmp_path / "mark").exists()


def test_a_hyperparameter_that_is_saved_nowhere_is_named(folder: Path) -> None:
    name = f"{GROUPS}{Q}.eps"
    edit(folder, lambda metadata: metadata.storage_data.pop(MetadataIndex(name)))
    with pytest.raises(
        HeaderError, match=rf"(?s)'{name}' is not saved.*hint: the file is damaged; copy or save it again"
    ):
        plan_reshard(folder, target=DENSE[0])


def test_metadata_of_something_else_stay_side_files(hub_folder: HubFolder, tmp_path: Path) -> None:
    source = Path(shutil.copytree(hub_folder("llama"), tmp_path / "source"))
    with warnings.catch_warnings(action="ignore"):
        dcp.save({"other": {"x": torch.ones(3)}}, checkpoint_id=source / "extra", no_dist=True)
    execute_reshard(plan_reshard(source, target=DENSE[0]), tmp_path / "out")
    for file in (METADATA, DISTCP):
        assert (tmp_path / "out" / "extra" / file).read_bytes() == (source / "extra" / file).read_bytes()


def killed_with_state_done(plan: ReshardPlan, destination: Path) -> tuple[str, int]:
    """Let a run die when some of the state is safe; return the file and the place of a byte of that."""
    parts = [unit[0].parts[0] for unit in plan_units(plan.copy_plan, SMALL)]
    first, part, at = next(
        (number, part, at)
        for number, part in enumerate(parts)
        if (at := plan.copy_plan.destinations[part.destination]).file and at.file.endswith(".distcp")
    )
    kill_halfway(plan, destination, first + 1)
    return str(at.file), at.offset + part.destination_offset


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_killed_run_goes_on_unless_the_state_was_damaged(is_damaged: bool, folder: Path, tmp_path: Path) -> None:
    plan = plan_reshard(folder, target=DENSE[1])
    execute_reshard(plan, tmp_path / "whole")
    file, offset = killed_with_state_done(plan, tmp_path / "out")
    if is_damaged:
        content = bytearray((tmp_path / "out.partial" / file).read_bytes())
        content[offset] ^= 1
        (tmp_path / "out.partial" / file).write_bytes(content)
    said: list[str] = []
    execute_reshard(plan, tmp_path / "out", ReshardOptions(max_memory=SMALL, say=said.append))
    assert [("continuing an earlier run" in text, "starting over" in text) for text in said] == [
        (not is_damaged, is_damaged)
    ]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.full)])
def test_mutated_metadata_end_well_or_in_one_error(count: int, trained: Trained, tmp_path: Path) -> None:
    source = Path(shutil.copytree(trained("llama", "sgd"), tmp_path / "source"))
    whole = (source / METADATA).read_bytes()
    generator = torch.Generator().manual_seed(count)
    messages: list[str] = []
    for _ in range(count):
        changed = bytearray(whole)
        for place in torch.randint(len(changed), (2,), generator=generator).tolist():
            changed[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        (source / METADATA).write_bytes(changed)
        try:
            plan_reshard(source, target=DENSE[0])
        except MigratorError as error:
            messages.append(error.message)
    assert len(messages) > count // 3
    assert [message for message in messages if "\n" in message] == []


def test_hub_form_can_demand_the_state() -> None:
    assert ReshardTarget("hf").optimizer_choice == "leave"
    assert ReshardTarget("dcp").optimizer_choice == "include"
    with pytest.raises(UsageError):
        ReshardTarget("hf", Mesh(tp=2), optimizer=True)
