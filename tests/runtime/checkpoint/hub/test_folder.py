"""Hub form read without trust: every way in which a folder can lie has one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from plans.errors import CheckpointError, HeaderError, IncompleteError, MigratorError
from runtime.checkpoint.files.file_names import INDEX, WEIGHTS
from runtime.checkpoint.files.safetensors import has_same_bytes
from runtime.checkpoint.hub.files import read_hub

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 2)}, folder / FIRST, metadata={"format": "pt"})
    save_file({"c": torch.zeros(3)}, folder / SECOND)
    write_index(folder, {"a": FIRST, "b": FIRST, "c": SECOND})
    (folder / "config.json").write_text("{}")
    return folder


def write_index(folder: Path, weight_map: object, **more: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map} | more))


def test_several_files_with_an_index(hub: Path) -> None:
    found = read_hub(hub)
    assert {name: tensor.file.name for name, tensor in found.tensors.items()} == {"a": FIRST, "b": FIRST, "c": SECOND}
    assert found.index is not None
    assert found.index.content == {"metadata": {"total_size": 44}}
    assert [header.metadata for header in found.headers] == [{"format": "pt"}, {}]
    assert found.side_files.copied == ("config.json",)


def test_one_file_is_taken_before_an_index(hub: Path) -> None:
    save_file({"only": torch.zeros(1)}, hub / WEIGHTS)
    assert list(read_hub(hub).tensors) == ["only"]


def break_index(weight_map: object) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, weight_map)


def write_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / SECOND, outside)
    (folder / SECOND).symlink_to(outside)


def only_pickles(folder: Path) -> None:
    remove_weights(folder)
    for name in ("one.bin", "other.bin"):
        torch.save({"a": torch.zeros(2)}, folder / name)


def remove_weights(folder: Path) -> None:
    for name in (INDEX, FIRST, SECOND):
        (folder / name).unlink()


def become(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        remove_weights(folder)
        save_file({"a": torch.zeros(2)}, folder / name)

    return change


def become_archive(folder: Path) -> None:
    remove_weights(folder)
    torch.save({"a": torch.zeros(2)}, folder / "__0_0.distcp")


def only_an_empty_file(folder: Path) -> None:
    remove_weights(folder)
    (folder / FIRST).touch()


def link_nowhere(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to("nowhere")


def only_a_broken_link(folder: Path) -> None:
    remove_weights(folder)
    (folder / WEIGHTS).symlink_to("nowhere")


def nested(depth: int) -> object:
    return [nested(depth - 1)] if depth else 0


def become_folder(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()


BROKEN: dict[str, tuple[Callable[[Path], None], type[MigratorError], str]] = {
    "no weights": (
        remove_weights,
        IncompleteError,
        r"(?s)no model.safetensors.*hint: name the folder with the weights",
    ),
    "only pickles": (only_pickles, IncompleteError, "contains pickled weights.*'one.bin', 'other.bin'"),
    "rank files": (become("rank-00000-of-00001.safetensors"), IncompleteError, "without the migrator.json"),
    "distcp": (become_archive, IncompleteError, "without the .metadata"),
    "an empty file": (only_an_empty_file, IncompleteError, f"contains an empty file: '{FIRST}'"),
    "one empty file": (write_text(SECOND, ""), IncompleteError, "truncated"),
    "a broken link": (link_nowhere, IncompleteError, "a broken link"),
    "only a broken link": (only_a_broken_link, IncompleteError, "model.safetensors: a broken link"),
    "dcp safetensors": (
        become("shard-00001-model-00001-of-00001.safetensors"),
        IncompleteError,
        "without the model.safetensors.index.json",
    ),
    "a file is missing": (lambda folder: (folder / SECOND).unlink(), IncompleteError, SECOND),
    "a file is a folder": (
        become_folder,
        IncompleteError,
        SECOND,
    ),
    "a tensor is missing": (break_index({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}), IncompleteError, "'d'"),
    "a tensor is elsewhere": (break_index({"a": FIRST, "b": SECOND, "c": SECOND}), HeaderError, "maps tensor 'b' to"),
    "a path up": (break_index({"a": "../" + FIRST}), HeaderError, "not a safetensors file of this folder"),
    "an absolute path": (break_index({"a": "/etc/passwd.safetensors"}), HeaderError, "not a safetensors file"),
    "a path down": (break_index({"a": "sub/" + FIRST}), HeaderError, "not a safetensors file"),
    "a NUL": (break_index({"a": "a\0.safetensors"}), HeaderError, "not a safetensors file"),
    "another kind of file": (break_index({"a": "config.json"}), HeaderError, "not a safetensors file"),
    "an empty name": (break_index({"a": ""}), HeaderError, "not a safetensors file"),
    "no map": (write_text(INDEX, "{}"), HeaderError, "no weight_map"),
    "an empty map": (break_index({}), HeaderError, "no weight_map"),
    "a map of numbers": (break_index({"a": 1}), HeaderError, "no weight_map"),
    "a map that is a list": (break_index([FIRST]), HeaderError, "no weight_map"),
    "no JSON": (write_text(INDEX, "{"), HeaderError, "not valid JSON"),
    "a key twice": (write_text(INDEX, '{"weight_map": {"a": "x", "a": "y"}}'), HeaderError, "twice"),
    "a side file that links out": (
        lambda folder: (folder / "notes.txt").symlink_to("/etc/hostname"),
        CheckpointError,
        "notes.txt: a link",
    ),
    "a deep index": (
        lambda folder: write_index(folder, {"a": FIRST, "b": FIRST, "c": SECOND}, deep=nested(200)),
        HeaderError,
        "nested",
    ),
    "half a surrogate": (
        write_text(INDEX, '{"weight_map": {"a": "x"}, "note": ["\\ud800"]}'),
        HeaderError,
        "not valid",
    ),
    "no number": (write_text(INDEX, '{"weight_map": {"a": "x"}, "note": NaN}'), HeaderError, "NaN"),
    "a link out of the folder": (link_out, CheckpointError, "leads out"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_has_one_clear_error(case: str, hub: Path) -> None:
    change, error, words = BROKEN[case]
    change(hub)
    with pytest.raises(error, match=words) as caught:
        read_hub(hub)
    assert str(hub) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_what_the_index_leaves_out_is_named_and_not_read(hub: Path) -> None:
    save_file({"c": torch.zeros(3), "a": -torch.arange(4.0), "stale": torch.ones(5)}, hub / SECOND)
    save_file({"b": torch.zeros(2, 2)}, hub / "overlay.safetensors")
    found = read_hub(hub)
    assert {name: tensor.file.name for name, tensor in found.tensors.items()} == {"a": FIRST, "b": FIRST, "c": SECOND}
    assert [list(header.tensors) for header in found.headers] == [["a", "b"], ["c"]]
    assert set(map(str, found.side_files.left_behind)) == {
        f"overlay.safetensors ({(hub / 'overlay.safetensors').stat().st_size} bytes, which {INDEX} does not name)",
        f"'a' in {SECOND} (16 bytes, which {INDEX} maps to {FIRST})",
        f"'stale' in {SECOND} (20 bytes, which {INDEX} does not name)",
    }
    assert found.side_files.copied == ("config.json",)


def test_a_file_that_is_not_named_is_not_even_opened(hub: Path) -> None:
    (hub / "overlay.safetensors").write_bytes(b"damaged")
    assert set(read_hub(hub).tensors) == {"a", "b", "c"}


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"(?s)not a folder.*hint: name the folder with config.json and the weights"
    ):
        read_hub(tmp_path / "nothing")


def test_links_of_the_hub_cache_are_followed(hub: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(hub.iterdir())):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    found = read_hub(snapshot)
    assert set(found.tensors) == {"a", "b", "c"}
    assert found.side_files.copied == ("config.json",)


def test_equal_bytes_are_found_equal(hub: Path) -> None:
    save_file({"x": torch.arange(4.0), "y": -torch.arange(4.0), "z": torch.arange(4.0).reshape(2, 2)}, hub / SECOND)
    write_index(hub, {"a": FIRST, "b": FIRST, "x": SECOND, "y": SECOND, "z": SECOND})
    tensors = read_hub(hub).tensors
    assert has_same_bytes(tensors["a"], tensors["x"])
    assert not has_same_bytes(tensors["a"], tensors["y"])
    assert not has_same_bytes(tensors["a"], tensors["z"])
