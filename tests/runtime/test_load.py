"""A rank's own file into its own tensors, bit for bit, and what does not fit refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from plans.errors import CheckpointError, HeaderError, IncompleteError, MismatchError
from tests.runtime import rank_cases
from tests.runtime.rank_pool import RankPool

RankFolder = Callable[[str, int], Path]
FIRST = "rank-00000-of-00002.safetensors"
SECOND = "rank-00001-of-00002.safetensors"


@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_tensors_and_buffers_hold_the_stored_bits(name: str, two_ranks: RankPool, rank_folder: RankFolder) -> None:
    assert two_ranks.run(rank_cases.stored_bits_kept, rank_folder(name, 2)) == [True, True]


def test_only_the_ranks_own_file_is_opened(two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rank_folder("llama", 2), tmp_path / "ranks"))
    (folder / FIRST).write_bytes(b"not a safetensors file")
    with pytest.raises(HeaderError, match=FIRST):
        two_ranks.run(rank_cases.load_into, folder, folder)
    assert two_ranks.run(rank_cases.loads_on, 1, folder) == [None, True]


def test_a_missing_tensor_is_named(two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = edited(rank_folder("llama", 2), tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(IncompleteError, match=rf"{SECOND}: no 'model\.norm\.weight'"):
        two_ranks.run(rank_cases.load_into, folder, folder)


def test_an_unexpected_tensor_is_named(two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = edited(
        rank_folder("llama", 2), tmp_path, lambda tensors: tensors.update(more=tensors["model.norm.weight"].clone())
    )
    with pytest.raises(MismatchError, match=rf"{SECOND}: holds 'more', which the model lacks"):
        two_ranks.run(rank_cases.load_into, folder, folder)


def test_a_tensor_of_another_shape_is_named(two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    folder = edited(rank_folder("llama", 2), tmp_path, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(MismatchError, match=r"'model\.embed_tokens\.weight' is \[49, 32\] where this rank holds \[50"):
        two_ranks.run(rank_cases.load_into, folder, folder)


def test_a_folder_for_another_world_size_is_refused(two_ranks: RankPool, rank_folder: RankFolder) -> None:
    with pytest.raises(IncompleteError, match=rf"{FIRST}: missing"):
        two_ranks.run(rank_cases.load_into, rank_folder("llama", 4), rank_folder("llama", 4))


def test_a_link_in_place_of_a_rank_file_is_refused(
    two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(rank_folder("llama", 2), tmp_path / "ranks"))
    (folder / SECOND).rename(tmp_path / "elsewhere")
    (folder / SECOND).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{SECOND}: a link that leads out"):
        two_ranks.run(rank_cases.load_into, folder, folder)


def edited(folder: Path, target: Path, edit: Callable[..., object]) -> Path:
    copy = Path(shutil.copytree(folder, target / "ranks"))
    tensors = load_file(copy / SECOND)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, copy / SECOND, {"format": "pt"})
    return copy
