"""Mutated checkpoints through the whole of a reshard: it ends well or in one clear error, and writes nowhere else."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.errors import DestinationError, MigratorError
from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.calls import count_calls
from tests.conftest import HubFolder

CALLS, BYTES = 1_000_000, 2**30
ODD: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1e300, [], {}, [[]], [2**40, 2**40], [-1]),
    *("", "../../outside", "/etc/passwd", "model.safetensors", "config.json", "F4", "BF16", "x" * 5000, "\0"),
    *({"shard": 7}, {"packed": [0, 0]}),
]
Mutation = tuple[int, int, int]
MUTATIONS: st.SearchStrategy[list[Mutation]] = st.lists(
    st.tuples(st.integers(0, 2**20), st.integers(0, 7), st.integers(0, 255)), min_size=1, max_size=3
)


def slots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container with a key or index of it, outermost first."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from slots(inner)


def mutated_json(text: bytes, mutation: Mutation) -> bytes:
    """Change one value of a JSON text, take it out, or put another's in its place."""
    place, kind, value = mutation
    found = json.loads(text)
    at = list(slots(found))
    container, key = at[place % len(at)]
    match kind % 4:
        case 0 | 1:
            container[key] = ODD[value % len(ODD)]
        case 2:
            del container[key]
        case 3:
            other, name = at[value % len(at)]
            container[key] = json.loads(json.dumps(other[name]))
    return json.dumps(found).encode()


def mutated_bytes(content: bytes, mutation: Mutation) -> bytes:
    place, kind, value = mutation
    at = place % (len(content) + 1)
    match kind % 4:
        case 0:
            return content[:at] + bytes([value]) + content[at + 1 :]
        case 1:
            return content[:at] + content[at + value :]
        case 2:
            return content[:at] + bytes([value]) * (value % 17) + content[at:]
        case _:
            return content[:at]


def mutated(content: bytes, mutations: list[Mutation]) -> bytes:
    """Mutate a text: as JSON as long as it is some, and else by bytes."""
    for mutation in mutations:
        try:
            content = (mutated_json if mutation[1] < 4 else mutated_bytes)(content, mutation)
        except (ValueError, RecursionError, IndexError, KeyError, TypeError, ZeroDivisionError):
            content = mutated_bytes(content, mutation)
    return content


def mutated_header(content: bytes, mutations: list[Mutation]) -> bytes:
    """Mutate the header of a safetensors file; one time in eight its length is left as it was."""
    length = int.from_bytes(content[:8], "little")
    header = mutated(content[8 : 8 + length], mutations)
    said = length if mutations[0][2] % 8 == 0 else len(header)
    return struct.pack("<Q", said) + header + content[8 + length :]


def of_hub(hub: Path, folder: Path) -> Path:
    return Path(shutil.copytree(hub, folder))


def of_ranks(hub: Path, folder: Path) -> Path:
    execute_reshard(plan_reshard(hub, target=ReshardTarget("ranks", Mesh(tp=2))), folder)
    return folder


def of_dcp(hub: Path, folder: Path) -> Path:
    execute_reshard(plan_reshard(hub, target=ReshardTarget("dcp", Mesh(tp=2))), folder)
    return folder


Mutate = Callable[[bytes, list[Mutation]], bytes]
VICTIMS: dict[str, tuple[Callable[[Path, Path], Path], str, Mutate]] = {
    "hub config": (of_hub, "config.json", mutated),
    "hub index": (of_hub, "model.safetensors.index.json", mutated),
    "hub header": (of_hub, "model-00001-of-*.safetensors", mutated_header),
    "manifest": (of_ranks, "migrator.json", mutated),
    "rank header": (of_ranks, "rank-00001-of-00002.safetensors", mutated_header),
    "shard header": (of_dcp, "shard-00001-*.safetensors", mutated_header),
    "manifest of shards": (of_dcp, "migrator.json", mutated),
}


@pytest.fixture(scope="module", params=VICTIMS)
def victim(request: Any, hub_folder: HubFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Mutate]:
    make, pattern, mutate = VICTIMS[request.param]
    # The folder has neighbours, so that a name with `../` would find something to write to.
    inner = tmp_path_factory.mktemp("victim") / "inner"
    inner.mkdir()
    folder = make(hub_folder("qwen3_moe"), inner / "source")
    (folder.parent / "outside").write_text("as it was")
    return folder, next(folder.glob(pattern)), mutate


def around(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what lies around a checkpoint, and the checkpoint: names, sizes and times of change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.parent.parent.rglob("*")
        if path.is_file()
    }


def refusal(folder: Path, destination: Path) -> MigratorError | None:
    """Reshard as the command does, and return why not if it is refused; only our own errors refuse."""
    try:
        execute_reshard(plan_reshard(folder, target=ReshardTarget("ranks", Mesh(tp=2))), destination)
    except MigratorError as error:
        return error
    return None


def ends_well(folder: Path, destination: Path) -> bool:
    """Return whether a checkpoint is resharded; else it must be refused in one line, with a hint."""
    error = refusal(folder, destination)
    if error is None:
        return (destination / "migrator.json").is_file()
    assert not isinstance(error, DestinationError)
    assert "\n" not in str(error).split("\nhint:")[0]
    assert error.hint
    return False


def check(victim: tuple[Path, Path, Mutate], mutations: list[Mutation], room_for_results: Path) -> bool:
    folder, file, mutate = victim
    destination = room_for_results / "out"
    original, times = file.read_bytes(), file.stat()
    file.write_bytes(mutate(original, mutations))
    before = around(folder)
    room = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with count_calls() as calls:
            well = ends_well(folder, destination)
        assert around(folder) == before
    finally:
        file.write_bytes(original)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        for left in destination.parent.glob(f"{destination.name}*"):
            shutil.rmtree(left)
    assert calls() < CALLS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - room) * 1024 < BYTES
    return well


@settings(max_examples=15)
@given(mutations=MUTATIONS)
def test_mutated_checkpoints(mutations: Any, victim: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(victim, mutations, tmp_path_factory.getbasetemp())


@pytest.mark.full
@settings(max_examples=800)
@given(mutations=MUTATIONS)
def test_thousands_of_mutated_checkpoints(
    mutations: Any, victim: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(victim, mutations, tmp_path_factory.getbasetemp())


def test_a_whole_checkpoint_ends_well(victim: Any, tmp_path: Path) -> None:
    """A check of the check: what is not mutated is resharded, and what is cut is not."""
    folder, file, _ = victim
    assert ends_well(folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert not check((folder, file, lambda content, _: content[:-30]), [(0, 0, 0)], tmp_path)
