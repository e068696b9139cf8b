"""The way back to hub form is exact: headers and indexes return byte for byte, whoever wrote them and however."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plans.errors import HeaderError
from plans.mesh import Mesh
from runtime.checkpoint.files.file_names import INDEX, MANIFEST
from runtime.checkpoint.files.safetensors import read_header
from runtime.checkpoint.manifest import pack_bytes, unpack_bytes
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder

HUB = ReshardTarget("hf")
OVER = {"ranks": ReshardTarget("ranks", Mesh(tp=2)), "dcp": ReshardTarget("dcp", Mesh(tp=2, fsdp=2)), "hf": HUB}


def split_header(path: Path) -> tuple[dict[str, object], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, text: str) -> None:
    """Put another header, its length as its JSON has it, before the same tensors."""
    _, data = split_header(path)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)


def rewrite(change: Callable[[dict[str, object]], str]) -> Callable[[Path], None]:
    return lambda path: write_header(path, change(split_header(path)[0]))


def reverse(entries: dict[str, object]) -> str:
    return json.dumps(dict(reversed(entries.items())), separators=(",", ":"))


def reorder_fields(entries: dict[str, object]) -> str:
    turned = {
        name: dict(reversed(row.items())) if name != "__metadata__" and isinstance(row, dict) else row
        for name, row in entries.items()
    }
    return json.dumps(turned)


HEADERS: dict[str, Callable[[Path], None]] = {
    "of safetensors": lambda path: None,
    "of safetensors, no metadata": lambda path: save_file(load_file(path), path),
    "empty metadata": rewrite(lambda entries: json.dumps({**entries, "__metadata__": {}}, separators=(",", ":"))),
    "null metadata": rewrite(lambda entries: json.dumps({**entries, "__metadata__": None})),
    "metadata last": rewrite(
        lambda e: json.dumps(
            {**{k: v for k, v in e.items() if k != "__metadata__"}, "__metadata__": {"b": "1", "a": "é"}}
        )
    ),
    "spaces and lines": rewrite(lambda entries: json.dumps(entries, indent=3)),
    "not padded": rewrite(lambda entries: json.dumps(entries, separators=(",", ":")) + " "),
    "padded to a page": rewrite(lambda entries: json.dumps(entries, separators=(",", ":")).ljust(4096)),
    "spaces before": rewrite(lambda entries: "  " + json.dumps(entries)),
    "other order": rewrite(reverse),
    "fields in other order": rewrite(reorder_fields),
    "escaped": rewrite(lambda entries: json.dumps({**entries, "__metadata__": {"note": "\u00e9\U0001f600"}})),
}


def unordered_index(text: str) -> str:
    content = json.loads(text)
    content["weight_map"] = dict(reversed(content["weight_map"].items()))
    return json.dumps({"weight_map": content["weight_map"], "metadata": content["metadata"]}, indent=4)


INDEXES: dict[str, Callable[[str], str]] = {
    "of save_pretrained": lambda text: text,
    "no last line break": lambda text: text.rstrip("\n"),
    "other order": unordered_index,
    "on one line": lambda text: json.dumps(json.loads(text)),
    "Windows lines": lambda text: text.replace("\n", "\r\n"),
}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("header", HEADERS)
def test_whole_files_come_back(header: str, over: str, hub_folder: HubFolder, tmp_path: Path) -> None:
    source = Path(shutil.copytree(hub_folder("llama"), tmp_path / "source"))
    for number, path in enumerate(sorted(source.glob("*.safetensors"))):
        if number % 2 == 0:  # a file of the usual kind stays beside each odd one
            HEADERS[header](path)
            assert load_file(path)  # safetensors itself reads it
    index = source / INDEX
    text = list(INDEXES.values())[list(HEADERS).index(header) % len(INDEXES)](index.read_text())
    index.write_bytes(text.encode())
    execute_reshard(plan_reshard(source, target=OVER[over]), tmp_path / "over")
    execute_reshard(plan_reshard(tmp_path / "over", target=HUB), tmp_path / "back")
    assert files(tmp_path / "back") == files(source)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_writes_comes_back(hub_folder: HubFolder, tmp_path: Path) -> None:
    """torch's own writer of hub form, consolidated into one file."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    tensors = {}
    for path in sorted(hub_folder("qwen2").glob("*.safetensors")):
        tensors |= load_file(path)
    writer = HuggingFaceStorageWriter(
        str(tmp_path / "written"), save_distributed=False, fqn_to_index_mapping=dict.fromkeys(tensors, 1)
    )
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    source = tmp_path / "source"
    source.mkdir()
    (written,) = (tmp_path / "written").glob("*.safetensors")
    shutil.copy(written, source / "model.safetensors")
    shutil.copy(hub_folder("qwen2") / "config.json", source)
    execute_reshard(plan_reshard(source, Mesh(tp=2)), tmp_path / "ranks")
    execute_reshard(plan_reshard(tmp_path / "ranks", target=HUB), tmp_path / "back")
    assert files(tmp_path / "back") == files(source)


def test_usual_headers_take_no_space_in_the_manifest(hub_folder: HubFolder, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(hub_folder("llama"), Mesh(tp=2)), tmp_path / "ranks")
    assert "verbatim" not in json.loads((tmp_path / "ranks" / MANIFEST).read_text())["stored_form"]


def test_recorded_headers_are_small(hub_folder: HubFolder, tmp_path: Path) -> None:
    source = Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "source"))
    for path in source.glob("*.safetensors"):
        HEADERS["spaces and lines"](path)
    execute_reshard(plan_reshard(source, Mesh(tp=2)), tmp_path / "ranks")
    manifest = tmp_path / "ranks" / MANIFEST
    verbatim = json.loads(manifest.read_text())["stored_form"]["verbatim"]
    assert sorted(verbatim) == sorted(path.name for path in source.glob("*.safetensors"))
    assert sum(map(len, verbatim.values())) < manifest.stat().st_size / 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "no base64",
        lambda content: pack_bytes(b"x" * 100),
        lambda content: pack_bytes(content[:-1]),
        lambda content: pack_bytes(content.replace(b"F32", b"I32")),
        lambda content: pack_bytes(struct.pack("<Q", len(content)) + content[8:]),
        lambda content: pack_bytes(b"\0" * 200_000_000),
    ],
)
def test_a_recorded_header_of_other_tensors_is_refused(
    damage: Callable[[bytes], str], hub_folder: HubFolder, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(hub_folder("llama"), tmp_path / "source"))
    file = min(source.glob("*.safetensors"))
    HEADERS["spaces and lines"](file)
    execute_reshard(plan_reshard(source, Mesh(tp=2)), tmp_path / "ranks")
    manifest = json.loads((tmp_path / "ranks" / MANIFEST).read_text())
    manifest["stored_form"]["verbatim"][file.name] = damage(read_header(file).content)
    (tmp_path / "ranks" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(HeaderError, match=f"the recorded bytes of {file.name} do not describe its tensors") as caught:
        plan_reshard(tmp_path / "ranks", target=HUB)
    assert caught.value.hint == "the manifest is damaged; reshard again from the original"


def test_a_recorded_index_of_other_tensors_is_refused(hub_folder: HubFolder, tmp_path: Path) -> None:
    source = Path(shutil.copytree(hub_folder("llama"), tmp_path / "source"))
    text = INDEXES["other order"]((source / INDEX).read_text())
    (source / INDEX).write_text(text)
    execute_reshard(plan_reshard(source, Mesh(tp=2)), tmp_path / "ranks")
    manifest = json.loads((tmp_path / "ranks" / MANIFEST).read_text())
    manifest["stored_form"]["verbatim"][INDEX] = pack_bytes(
        text.replace("lm_head", "lm_tail").replace("norm", "mron").encode()
    )
    (tmp_path / "ranks" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(HeaderError, match=r"recorded bytes of model\.safetensors\.index\.json do not describe"):
        plan_reshard(tmp_path / "ranks", target=HUB)


def test_content_of_a_file_that_is_none_of_the_form_is_refused(hub_folder: HubFolder, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(hub_folder("llama"), Mesh(tp=2)), tmp_path / "ranks")
    manifest = json.loads((tmp_path / "ranks" / MANIFEST).read_text())
    manifest["stored_form"]["verbatim"] = {"../other": pack_bytes(b"x")}
    (tmp_path / "ranks" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(HeaderError, match=r"'\.\./other', which is none of its files"):
        plan_reshard(tmp_path / "ranks", target=HUB)


def test_unpacking_is_bounded() -> None:
    packed = pack_bytes(b"\0" * 1_000_000)
    assert unpack_bytes(packed, 1_000_000) == b"\0" * 1_000_000
    assert unpack_bytes(packed, 999_999) is None
    assert unpack_bytes(packed + "!", 1_000_000) is None
    assert unpack_bytes(pack_bytes(b"x")[:-4], 10) is None


def test_tensors_that_the_index_leaves_out_leave_the_rest_exact(hub_folder: HubFolder, tmp_path: Path) -> None:
    """The stale tensor is named, and the other files come back whole."""
    source = Path(shutil.copytree(hub_folder("llama"), tmp_path / "source"))
    first, *others = sorted(source.glob("*.safetensors"))
    kept = load_file(first)
    save_file(kept | {"stale": torch.ones(3)}, first, metadata={"format": "pt"})
    plan = plan_reshard(source, Mesh(tp=2))
    assert [str(left) for left in plan.checkpoint.side_files.left_behind] == [
        f"'stale' in {first.name} (12 bytes, which {INDEX} does not name)"
    ]
    execute_reshard(plan, tmp_path / "ranks")
    execute_reshard(plan_reshard(tmp_path / "ranks", target=HUB), tmp_path / "back")
    assert load_file(tmp_path / "back" / first.name).keys() == kept.keys()
    assert all((tmp_path / "back" / path.name).read_bytes() == path.read_bytes() for path in [*others, source / INDEX])
