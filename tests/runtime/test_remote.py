"""Folders that lie elsewhere, from a store that fails in every way: one clear error, or the right bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from plans.errors import CheckpointError, IncompleteError, MigratorError
from runtime.checkpoint.files import remote
from runtime.checkpoint.files.remote import find_remote
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.remote import RemoteEntry, mount
from tests.conftest import HubFolder
from tests.runtime.test_hub import files


@dataclass
class Store:
    """A folder in memory, whose answers a test may spoil."""

    contents: dict[str, bytes]
    spoil: Callable[[str, bytes], bytes] = lambda name, part: part
    address: str = "store://bucket/model"
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    above: bytes | None = None

    def list_files(self) -> Mapping[str, RemoteEntry]:
        return {name: RemoteEntry(len(text), str(hash(text))) for name, text in self.contents.items()}

    def read(self, name: str, offset: int, size: int) -> bytes:
        self.asked.append((name, offset, size))
        return self.spoil(name, self.contents[name][offset : offset + size])

    def read_above(self, name: str) -> tuple[str, bytes] | None:
        return None if self.above is None else ("store://bucket", self.above)

    def identify(self, name: str) -> str | None:
        return str(hash(self.contents[name])) if name in self.contents else None


@pytest.fixture
def store(hub_folder: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.0)
    return Store(files(hub_folder("qwen2")))


def test_what_is_read_by_ranges_is_what_lies_there(store: Store, hub_folder: HubFolder, tmp_path: Path) -> None:
    plan = plan_reshard(mount(store), target=ReshardTarget("hf"))
    execute_reshard(plan, tmp_path / "out")
    expected = files(hub_folder("qwen2"))
    assert {name: text for name, text in files(tmp_path / "out").items() if name in expected} == expected


def test_it_is_fetched_again_only_if_it_changed(store: Store) -> None:
    folder = mount(store)
    first = len(store.asked)
    assert mount(store) == folder
    assert len(store.asked) == first
    store.contents["config.json"] += b" "
    store.contents.pop("generation_config.json")
    assert mount(store) == folder
    assert [name for name, *_ in store.asked[first:]] == ["config.json"]
    assert not (folder / "generation_config.json").exists()


def test_a_lost_connection_is_taken_up_where_it_was_lost(store: Store) -> None:
    lost = iter(range(3))

    def cut(name: str, part: bytes) -> bytes:
        if next(lost, None) == 1:
            raise ConnectionError("reset by peer")
        return part[:100]

    store.contents["config.json"] += b" " * 300
    store.spoil = cut
    folder = mount(store)
    assert (folder / "config.json").read_bytes() == store.contents["config.json"]


def fail(error: Exception) -> Callable[[str, bytes], bytes]:
    def raise_it(name: str, part: bytes) -> bytes:
        raise error

    return raise_it


FAILURES: dict[str, tuple[Exception, str, str, int]] = {
    "a network that is gone": (ConnectionError("refused"), "refused", "check the network and try again", 5),
    "no permission": (
        PermissionError(13, "secret"),
        "no permission to read it",
        "log in with the store's own tools",
        1,
    ),
    "gone": (FileNotFoundError(2, "gone"), "not there", "check the address", 1),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_cannot_be_read_is_one_clear_error(case: str, store: Store) -> None:
    error, words, hint, attempts = FAILURES[case]
    store.contents = {"config.json": store.contents["config.json"]}
    store.spoil = fail(error)
    with pytest.raises(CheckpointError, match=words) as caught:
        mount(store)
    assert caught.value.message.startswith("store://bucket/model/config.json: ")
    assert caught.value.hint.startswith(hint)
    assert len(store.asked) == attempts


def test_a_file_that_became_shorter_is_named(store: Store) -> None:
    folder = mount(store)
    path = min(folder.glob("*.safetensors"))
    file = find_remote(path)
    assert file is not None
    store.contents[path.name] = store.contents[path.name][:-50]
    with pytest.raises(IncompleteError, match="ends after") as caught:
        file.read(file.size - 100, 100)
    assert caught.value.hint == "wait until nothing writes to it, then run the same command again"


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a//b", "a\\b", "nul\0", ""])
def test_names_that_lead_elsewhere_are_refused(name: str, store: Store, tmp_path: Path) -> None:
    store.contents = {name: b"{}"}
    with pytest.raises(MigratorError, match="which no disk allows") as caught:
        mount(store)
    assert caught.value.hint == "rename it, or do not trust this checkpoint"
    assert not list(tmp_path.rglob("passwd"))


def test_a_header_that_lies_about_its_size_costs_no_more_than_a_file_may_have(store: Store) -> None:
    name = next(name for name in store.contents if name.endswith(".safetensors"))
    store.contents[name] = (2**62).to_bytes(8, "little") + store.contents[name][8:]
    with pytest.raises(MigratorError, match="exceeds the format's limit"):
        open_checkpoint(mount(store)).read_headers()
    assert [size for asked, _, size in store.asked if asked == name] == [min(2**16, len(store.contents[name]))]
