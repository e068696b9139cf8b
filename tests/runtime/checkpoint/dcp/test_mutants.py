"""Mutated distributed checkpoints: whatever is changed in their metadata, reading ends well or in one clear error."""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plans.errors import MigratorError
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.copying.copy_plan import Destination, build_copy_plan
from runtime.checkpoint.dcp.reader import read_dcp_checkpoint
from runtime.checkpoint.files.file_names import METADATA
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.models.config import read_config
from runtime.models.model import meta_model
from tests.conftest import HubFolder
from tests.runtime.checkpoint.dcp.test_metadata import DISTCP, save, weights


@pytest.fixture(scope="module")
def model(hub_folder: HubFolder) -> Any:
    return meta_model(read_config(hub_folder("llama")))


def mutated(content: bytes, mutations: list[tuple[int, int, int]]) -> bytes:
    """Return content with bytes changed, taken out or put in, or with a whole instruction put in."""
    changed = bytearray(content)
    for place, kind, value in mutations:
        at = place % max(len(changed), 1)
        match kind:
            case 0:
                changed[at : at + 1] = bytes([value])
            case 1:
                del changed[at : at + value]
            case 2:
                changed[at:at] = OPCODES[value % len(OPCODES)]
            case 3:
                changed[at:at] = changed[: value * 8]
    return bytes(changed)


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
MUTATIONS = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 3), st.integers(0, 255)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def mutant(hub_folder: HubFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(weights(hub_folder("llama")), tmp_path_factory.mktemp("mutant") / "saved", hub_folder("llama"))
    (folder / "whole").mkdir()
    for name in (METADATA, DISTCP):
        (folder / "whole" / name).write_bytes((folder / name).read_bytes())
    return folder


def is_refused(folder: Path, model: Any) -> bool:
    """Return whether reading ends in one of our errors; else it must end in content that can be copied."""
    try:
        content = read_dcp_checkpoint(folder, model)
    except MigratorError as error:
        refusal = str(error)
    else:
        check_can_be_copied(content)
        return False
    assert refusal.encode()
    assert "\n" not in refusal
    return True


def check_can_be_copied(content: Checkpoint) -> None:
    sizes = {name: tensor_bytes(held.dtype, held.shape) for name, held in content.tensors.items()}
    build_copy_plan(
        content.chunks, [(Destination(name, sizes[name]), form) for name, form in content.tensor_maps.items()]
    )


def check_mutant(name: str, mutations: list[tuple[int, int, int]], mutant: Path, model: Any) -> None:
    original = (mutant / "whole" / name).read_bytes()
    (mutant / name).write_bytes(mutated(original, mutations))
    try:
        is_refused(mutant, model)
    finally:
        (mutant / name).write_bytes(original)


@settings(max_examples=150)
@given(mutations=MUTATIONS)
def test_mutated_metadata_is_one_clear_error(mutations: Any, mutant: Path, model: Any) -> None:
    check_mutant(METADATA, mutations, mutant, model)


@settings(max_examples=50)
@given(mutations=MUTATIONS)
def test_mutated_archives_are_one_clear_error(mutations: Any, mutant: Path, model: Any) -> None:
    check_mutant(DISTCP, mutations, mutant, model)


@pytest.mark.full
@settings(max_examples=4000)
@given(mutations=MUTATIONS)
def test_thousands_of_mutated_metadata(mutations: Any, mutant: Path, model: Any) -> None:
    check_mutant(METADATA, mutations, mutant, model)


@pytest.mark.full
@settings(max_examples=1000)
@given(mutations=MUTATIONS)
def test_a_thousand_mutated_archives(mutations: Any, mutant: Path, model: Any) -> None:
    check_mutant(DISTCP, mutations, mutant, model)


def test_most_mutations_are_noticed(mutant: Path, model: Any) -> None:
    """A check of the check: whole files read, and cut ones do not."""
    assert not is_refused(mutant, model)
    for name in (METADATA, DISTCP):
        original = (mutant / name).read_bytes()
        (mutant / name).write_bytes(original[:-30])
        assert is_refused(mutant, model)
        (mutant / name).write_bytes(original)


@settings(max_examples=50)
@given(mutations=MUTATIONS)
def test_mutated_sharding_information_is_one_clear_error(mutations: Any, sharded: Path, model: Any) -> None:
    file = next(sharded.glob("*.safetensors"))
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    info = mutated(metadata["DCP_SHARDING_INFO"].encode(), mutations).decode("utf-8", "replace")
    content = file.read_bytes()
    try:
        save_file(tensors, file, {**metadata, "DCP_SHARDING_INFO": info})
        is_refused(sharded, model)
    finally:
        file.write_bytes(content)


@pytest.fixture(scope="module")
def sharded(hub_folder: HubFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "dcp"
    execute_reshard(plan_reshard(hub_folder("llama"), target=ReshardTarget("dcp")), folder)
    return folder
