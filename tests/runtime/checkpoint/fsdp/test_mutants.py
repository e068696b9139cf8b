"""Mutated state dicts and rank files: whatever is changed, reading ends well or in one clear error; nothing runs."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from plans.errors import MigratorError
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.fsdp.reader import read_fsdp_checkpoint
from runtime.checkpoint.hub.reader import read_hub_checkpoint
from runtime.models.config import read_config
from runtime.models.model import meta_model
from tests.conftest import HubFolder
from tests.runtime.checkpoint.dcp.test_metadata import zipped
from tests.runtime.checkpoint.dcp.test_mutants import MUTATIONS, check_can_be_copied, mutated
from tests.runtime.checkpoint.fsdp import fsdp_jobs
from tests.runtime.rank_pool import RankPool

Mutations = list[tuple[int, int, int]]
RANK_FILE = "model_world_size_2_rank_1.pt"


@pytest.fixture(scope="module")
def model(hub_folder: HubFolder) -> Any:
    return meta_model(read_config(hub_folder("qwen2")))


class Mutant:
    """A folder with one file that is mutated, and the mark that a planted call would leave."""

    def __init__(self, folder: Path, name: str, read: Callable[[Path, Any], Checkpoint]) -> None:
        self.folder, self.file, self.read = folder, folder / name, read
        self.original = self.file.read_bytes()
        with zipfile.ZipFile(self.file) as archive:
            self.members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        self.mark = folder / "mark"
        command = f"touch {self.mark}".encode()
        self.payload = b"cposix\nsystem\nX" + len(command).to_bytes(4, "little") + command + b"\x85R"

    def is_refused(self, content: bytes, model: Any) -> bool:
        """Return whether reading ends in one of our errors; else it must end in content that can be copied."""
        self.file.write_bytes(content)
        try:
            checkpoint = self.read(self.folder, model)
        except MigratorError as error:
            refusal = str(error)
        else:
            check_can_be_copied(checkpoint)
            return False
        finally:
            assert not self.mark.exists()
        assert refusal.encode()
        assert "\n" not in refusal
        return True

    def with_pickle(self, content: bytes) -> bytes:
        return zipped({**self.members, "data.pkl": content})


@pytest.fixture(scope="module")
def weights(hub_folder: HubFolder, tmp_path_factory: pytest.TempPathFactory) -> Mutant:
    folder = tmp_path_factory.mktemp("mutant")
    files = sorted(hub_folder("qwen2").glob("*.safetensors"))
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    torch.save(state, folder / "pytorch_model.bin")
    return Mutant(folder, "pytorch_model.bin", read_hub_checkpoint)


@pytest.fixture(scope="module")
def ranks(two_ranks: RankPool, hub_folder: HubFolder, tmp_path_factory: pytest.TempPathFactory) -> Mutant:
    folder = tmp_path_factory.mktemp("mutant")
    two_ranks.run(fsdp_jobs.save_ranks, hub_folder("qwen2"), folder, {"fsdp": 2}, "")
    shutil.copy(hub_folder("qwen2") / "config.json", folder)
    return Mutant(folder, RANK_FILE, read_fsdp_checkpoint)


@settings(max_examples=40)
@given(mutations=MUTATIONS)
def test_mutated_pickles_of_weights(mutations: Mutations, weights: Mutant, model: Any) -> None:
    weights.is_refused(weights.with_pickle(mutated(weights.members["data.pkl"], mutations)), model)


@settings(max_examples=40)
@given(mutations=MUTATIONS)
def test_mutated_pickles_of_ranks(mutations: Mutations, ranks: Mutant, model: Any) -> None:
    ranks.is_refused(ranks.with_pickle(mutated(ranks.members["data.pkl"], mutations)), model)


@settings(max_examples=40)
@given(mutations=MUTATIONS)
def test_mutated_archives(mutations: Mutations, weights: Mutant, model: Any) -> None:
    weights.is_refused(mutate_end(weights.original, mutations), model)


def mutate_end(content: bytes, mutations: Mutations) -> bytes:
    """Mutate the directory, where it matters most, or else the whole archive."""
    start = content.rfind(b"PK\x01\x02", 0, len(content) - 2000) if mutations[0][2] % 4 else 0
    return content[:start] + mutated(content[start:], mutations)


@settings(max_examples=40)
@given(place=st.integers(0, 2**20))
def test_a_planted_call_runs_nowhere(place: int, weights: Mutant, ranks: Mutant, model: Any) -> None:
    for mutant in (weights, ranks):
        original = mutant.members["data.pkl"]
        at = place % len(original)
        mutant.is_refused(mutant.with_pickle(original[:at] + mutant.payload + original[at:]), model)


def test_the_planted_call_would_run(weights: Mutant) -> None:
    import pickle

    pickle.loads(b"\x80\x02" + weights.payload + b".")
    assert weights.mark.exists()
    weights.mark.unlink()


def test_the_originals_are_read(weights: Mutant, ranks: Mutant, model: Any) -> None:
    """A check of the check: whole files are read, and cut ones are not."""
    for mutant in (weights, ranks):
        assert not mutant.is_refused(mutant.original, model)
        assert not mutant.is_refused(mutant.with_pickle(mutant.members["data.pkl"]), model)
        assert mutant.is_refused(mutant.original[:-30], model)


@pytest.mark.full
@settings(max_examples=5000)
@given(mutations=MUTATIONS)
def test_thousands_of_mutated_pickles_of_weights(mutations: Mutations, weights: Mutant, model: Any) -> None:
    weights.is_refused(weights.with_pickle(mutated(weights.members["data.pkl"], mutations)), model)


@pytest.mark.full
@settings(max_examples=4000)
@given(mutations=MUTATIONS)
def test_thousands_of_mutated_pickles_of_ranks(mutations: Mutations, ranks: Mutant, model: Any) -> None:
    ranks.is_refused(ranks.with_pickle(mutated(ranks.members["data.pkl"], mutations)), model)


@pytest.mark.full
@settings(max_examples=5000)
@given(mutations=MUTATIONS)
def test_thousands_of_mutated_archives(mutations: Mutations, weights: Mutant, model: Any) -> None:
    weights.is_refused(mutate_end(weights.original, mutations), model)


@pytest.mark.full
@settings(max_examples=1000)
@given(mutations=MUTATIONS)
def test_a_thousand_mutated_archives_of_ranks(mutations: Mutations, ranks: Mutant, model: Any) -> None:
    ranks.is_refused(mutate_end(ranks.original, mutations), model)


@pytest.mark.full
def test_a_planted_call_runs_in_no_position(weights: Mutant, ranks: Mutant, model: Any) -> None:
    for mutant in (weights, ranks):
        original = mutant.members["data.pkl"]
        for at in range(0, len(original), 1 + len(original) // 1000):
            mutant.is_refused(mutant.with_pickle(original[:at] + mutant.payload + original[at:]), model)
