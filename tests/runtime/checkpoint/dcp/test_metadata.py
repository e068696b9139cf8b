"""`.metadata` and `.distcp` files read without trust: nothing runs, nothing explodes, every lie is one clear error."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import MetadataIndex

from plans.errors import CheckpointError, HeaderError, IncompleteError, MigratorError, MismatchError
from runtime.checkpoint.dcp.reader import read_dcp_checkpoint
from runtime.checkpoint.files.file_names import METADATA
from runtime.checkpoint.pickled.pickle import read_pickle
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.models.config import read_config
from runtime.models.model import meta_model
from tests.conftest import HubFolder

NORM, EMBEDDING, Q = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
DISTCP = "__0_0.distcp"

State = dict[str, Any]


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


def save(state: State, folder: Path, hub: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / "config.json").write_bytes((hub / "config.json").read_bytes())
    return folder


def weights(hub: Path) -> State:
    return dict(transformers.AutoModelForCausalLM.from_pretrained(hub).state_dict())


@pytest.fixture
def state(hub_folder: HubFolder) -> State:
    return weights(hub_folder("llama"))


@pytest.fixture
def saved(state: State, hub_folder: HubFolder, tmp_path: Path) -> Path:
    return save(state, tmp_path / "saved", hub_folder("llama"))


@pytest.fixture(scope="module")
def model(hub_folder: HubFolder) -> Any:
    return meta_model(read_config(hub_folder("llama")))


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def test_tensors_in_any_memory_order_and_of_any_dtype_come_back(
    state: State, hub_folder: HubFolder, tmp_path: Path
) -> None:
    odd = {
        "odd.scalar": torch.tensor(2.5, dtype=torch.float64),
        "odd.empty": torch.zeros(0, 3),
        "odd.bool": torch.tensor([True, False, True]),
        "odd.int": torch.arange(7),
        "odd.e8m0": torch.ones(3).to(torch.float8_e8m0fnu),
        "odd.e4m3": torch.randn(5, 3).to(torch.float8_e4m3fn),
        "odd.complex": torch.randn(3, dtype=torch.complex64),
        "odd.turned": torch.randn(3, 4, 5).permute(2, 0, 1),
        "odd.slice": torch.randn(6, 8)[1:4, 2:5],
        "odd.every other": torch.randn(6, 8)[::2, ::3],
        "odd.expanded": torch.randn(3, 1).expand(3, 4),
    }
    changed = {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in state.items()}
    assert not changed[Q].is_contiguous()
    saved = save({**changed, **odd}, tmp_path / "saved", hub_folder("llama"))
    execute_reshard(plan_reshard(saved, target=ReshardTarget("hf")), tmp_path / "hub")
    found = load_file(tmp_path / "hub" / "model.safetensors")
    assert found.keys() == state.keys() - {"lm_head.weight"} | odd.keys()
    for name, tensor in found.items():
        expected = {**state, **odd}[name]
        assert tensor.dtype == expected.dtype, name
        assert tensor.shape == expected.shape, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name
    assert found[Q].is_contiguous()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_member_of_an_enumeration_may_be_pickled_by_its_name(
    protocol: int, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = pickle.loads((saved / METADATA).read_bytes())
    kind = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    # As Debian 12's Python does, 3.11.2; later releases name the value.
    monkeypatch.setattr(kind, "__reduce_ex__", lambda self, protocol: (getattr, (kind, self.name)))
    content = pickle.dumps(metadata, protocol)
    assert b"getattr" in content
    execute_reshard(plan_reshard(saved, target=ReshardTarget("hf")), tmp_path / "before")
    (saved / METADATA).write_bytes(content)
    execute_reshard(plan_reshard(saved, target=ReshardTarget("hf")), tmp_path / "after")
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after")]
    assert written[0] == written[1]


class Attribute:
    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize("owner", [torch.Size, torch.distributed.checkpoint.metadata.Metadata])
def test_no_other_attribute_may_be_named(owner: type, saved: Path) -> None:
    metadata = pickle.loads((saved / METADATA).read_bytes())
    metadata.planner_data = Attribute(owner, "__init__")
    (saved / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(HeaderError, match=r"names 'builtins\.getattr', which"):
        plan_reshard(saved, target=ReshardTarget("hf"))


def save_as_distcp(state: State, folder: Path, hub: Path) -> None:
    save(state, folder, hub)


def save_as_bin(state: State, folder: Path, hub: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_bytes((hub / "config.json").read_bytes())
    torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize("written", [save_as_distcp, save_as_bin])
@pytest.mark.parametrize(
    ("dtype", "said", "known"),
    [
        (torch.uint16, r"torch\.uint16", torch.float32),
        (torch.float8_e4m3fnuz, r"torch\.float8_e4m3fnuz", torch.float32),
        (torch.complex128, r"torch\.(complex128|ComplexDoubleStorage)", torch.complex64),
    ],
    ids=str,
)
def test_a_dtype_that_is_not_known_is_named_and_another_one_is_read(
    dtype: torch.dtype,
    said: str,
    known: torch.dtype,
    written: Callable[[State, Path, Path], None],
    state: State,
    hub_folder: HubFolder,
    tmp_path: Path,
) -> None:
    written({**state, "mtp.more": torch.ones(3).to(dtype)}, tmp_path / "unknown", hub_folder("llama"))
    with pytest.raises(
        CheckpointError,
        match=rf"(?s)'mtp\.more' has the dtype {said}, which is not known here.*"
        "hint: save the tensor in another dtype, such as torch.float32",
    ) as caught:
        plan_reshard(tmp_path / "unknown", target=ReshardTarget("hf"))
    assert "code" not in caught.value.hint
    written({**state, "mtp.more": torch.ones(3).to(dtype).to(known)}, tmp_path / "known", hub_folder("llama"))
    assert plan_reshard(tmp_path / "known", target=ReshardTarget("hf"))


def test_a_dtype_of_a_later_torch_is_named(saved: Path) -> None:
    content = pickle.dumps(pickle.loads((saved / METADATA).read_bytes()), protocol=2)
    assert b"ctorch\nfloat32\n" in content
    (saved / METADATA).write_bytes(content.replace(b"ctorch\nfloat32\n", b"ctorch\nfloat6_e3m2fn\n"))
    with pytest.raises(CheckpointError, match=r"has the dtype torch\.float6_e3m2fn, which is not known here"):
        plan_reshard(saved, target=ReshardTarget("hf"))


class TestNothingRuns:
    @pytest.fixture
    def mark(self, tmp_path: Path) -> Path:
        return tmp_path / "mark"

    def refused(self, folder: Path, mark: Path) -> str:
        with pytest.raises(HeaderError, match=r"posix\.system") as caught:
            plan_reshard(folder, target=ReshardTarget("hf"))
        assert not mark.exists()
        assert "it may run code" in caught.value.hint
        return str(caught.value)

    def test_the_payload_does_run_where_it_is_trusted(self, mark: Path) -> None:
        pickle.loads(pickle.dumps(Evil(mark)))
        assert mark.exists()

    def test_instead_of_metadata(self, saved: Path, mark: Path) -> None:
        (saved / METADATA).write_bytes(pickle.dumps(Evil(mark)))
        assert METADATA in self.refused(saved, mark)

    @pytest.mark.parametrize("field", ["planner_data", "storage_meta", "version"])
    @pytest.mark.parametrize("protocol", [2, 4, 5])
    def test_within_metadata(self, field: str, protocol: int, saved: Path, mark: Path) -> None:
        metadata = pickle.loads((saved / METADATA).read_bytes())
        setattr(metadata, field, Evil(mark))
        (saved / METADATA).write_bytes(pickle.dumps(metadata, protocol=protocol))
        self.refused(saved, mark)

    def test_instead_of_a_tensor(self, saved: Path, mark: Path) -> None:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as writer:
            writer.writestr("archive/data.pkl", pickle.dumps(Evil(mark), protocol=2))
        replace_archive(saved, NORM, archive.getvalue())
        assert DISTCP in self.refused(saved, mark)

    def test_what_is_no_tensor_is_never_read(self, state: State, hub_folder: HubFolder, mark: Path) -> None:
        saved = save({**state, "step": Evil(mark)}, mark.parent / "evil", hub_folder("llama"))
        plan = plan_reshard(saved, target=ReshardTarget("hf"))
        execute_reshard(plan, mark.parent / "hub")
        assert not mark.exists()
        assert list(map(str, plan.checkpoint.side_files.left_behind)) == [f"'step' of {METADATA} (no tensor)"]


def replace_archive(folder: Path, name: str, archive: bytes) -> None:
    """Put other bytes where a tensor is saved, at the end of the file."""
    with (folder / DISTCP).open("ab") as stream:
        offset = stream.tell()
        stream.write(archive)

    def moved(metadata: Any) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == name)
        metadata.storage_data[index] = replace(metadata.storage_data[index], offset=offset, length=len(archive))

    edit(folder, moved)


def saved_as(tensor: object) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


def unzipped(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name.removeprefix("archive/"): opened.read(name) for name in opened.namelist()}


GOOD = torch.arange(32.0)
PARTS = unzipped(saved_as(GOOD))
ARCHIVES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is not a zip archive"),
    "no archive": (b"x" * 1000, "is not a zip archive"),
    "half an archive": (saved_as(GOOD)[:700], "is not a zip archive"),
    "a damaged directory": (saved_as(GOOD).replace(b"PK\x01\x02", b"PK\x01\x03"), "its directory is damaged"),
    "a directory that leads elsewhere": (saved_as(GOOD).replace(b"PK\x03\x04", b"PK\x03\x05"), "leads to no member"),
    "a long directory": (zipped({f"{n}-{'x' * 60_000}": b"" for n in range(20)}), r"has a directory of 12\d{5} bytes"),
    "compressed": (zipped(PARTS, zipfile.ZIP_DEFLATED), "compressed"),
    "no description": (zipped({"data/0": PARTS["data/0"]}), "not an archive of torch.save"),
    "no storage": (zipped({"data.pkl": PARTS["data.pkl"]}), "not a plain tensor"),
    "a short storage": (zipped({**PARTS, "data/0": b"x" * 124}), "within its storage"),
    "a cut storage": (zipped({**PARTS, "data/0": b"x" * 127}), "within its storage"),
    "big-endian": (zipped({**PARTS, "byteorder": b"big"}), "big-endian"),
    "a long description": (zipped({**PARTS, "data.pkl": b"N" * 100_000}), "description of 100000"),
    "another dtype": (saved_as(GOOD.double()), r"is F64 \[32\], but .metadata lists F32"),
    "another shape": (saved_as(GOOD.view(4, 8)), r"is F32 \[4, 8\]"),
    "a dict": (saved_as({"a": GOOD}), "not a plain tensor"),
    "a conjugate": (saved_as(torch.zeros(32, dtype=torch.complex64).conj()), "not a plain tensor"),
    "sparse": (saved_as(GOOD.to_sparse()), "names 'torch._utils._rebuild_sparse_tensor'"),
    "one element many times": (zipped({**unzipped(saved_as(torch.ones(1).expand(32)))}), "within its storage"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_that_are_no_tensor_are_named(case: str, saved: Path, model: Any) -> None:
    archive, words = ARCHIVES[case]
    replace_archive(saved, NORM, saved_as(GOOD))
    read_dcp_checkpoint(saved, model)
    replace_archive(saved, NORM, archive)
    with pytest.raises(HeaderError, match=words):
        read_dcp_checkpoint(saved, model)


def index_of(metadata: Any, name: str) -> MetadataIndex:
    return next(index for index in metadata.storage_data if index.fqn == name)


def set_info(metadata: Any, **fields: object) -> None:
    index = index_of(metadata, NORM)
    metadata.storage_data[index] = replace(metadata.storage_data[index], **fields)


def second_model(metadata: Any) -> None:
    for name in list(metadata.state_dict_metadata):
        tensor = metadata.state_dict_metadata.pop(name)
        index = index_of(metadata, name)
        place = metadata.storage_data.pop(index)
        for prefix in ("model.", "average."):
            metadata.state_dict_metadata[prefix + name] = tensor
            metadata.storage_data[MetadataIndex(prefix + name, index.offset)] = place


LIES: dict[str, tuple[Callable[[Any], object], type[MigratorError], str]] = {
    "no place": (lambda m: m.storage_data.pop(index_of(m, NORM)), HeaderError, "saved nowhere"),
    "no tensor": (lambda m: m.state_dict_metadata.pop(NORM), IncompleteError, "is not stored; stored are "),
    "no chunks": (
        lambda m: m.state_dict_metadata[NORM].chunks.clear(),
        IncompleteError,
        f"lossy: '{NORM}' stored nowhere",
    ),
    "an empty tensor without chunks": (
        lambda m: m.state_dict_metadata.update(
            {"more": replace(m.state_dict_metadata[NORM], size=torch.Size((0, 3)), chunks=[])}
        ),
        IncompleteError,
        r"(?s)lossy: 'more' stored nowhere.*hint: the metadata lists more than was saved; save again",
    ),
    "another size": (
        lambda m: setattr(m.state_dict_metadata[NORM], "size", torch.Size((33,))),
        MismatchError,
        r"(?s)\[32\] in the model but \[33\].*hint: config\.json does not belong to these weights",
    ),
    "another dtype": (
        lambda m: setattr(m.state_dict_metadata[NORM].properties, "dtype", torch.float16),
        HeaderError,
        "lists F16",
    ),
    "an unknown dtype": (
        lambda m: setattr(m.state_dict_metadata[NORM].properties, "dtype", torch.quint8),
        CheckpointError,
        "has the dtype torch.quint8, which is not known here",
    ),
    "a function for a dtype": (
        lambda m: setattr(m.state_dict_metadata[NORM].properties, "dtype", torch.compile),
        HeaderError,
        r"(?s)names 'torch.compile'.*hint: do not load this file with torch either: it may run code",
    ),
    "a size below zero": (
        lambda m: setattr(m.state_dict_metadata[NORM], "size", torch.Size((-1,))),
        HeaderError,
        "not integers in range",
    ),
    "sizes of another kind": (
        lambda m: setattr(m.state_dict_metadata[NORM], "size", "32"),
        HeaderError,
        "not integers",
    ),
    "a chunk of another kind": (
        lambda m: setattr(m.state_dict_metadata[NORM], "chunks", [None]),
        HeaderError,
        "something other than ChunkStorageMetadata where one",
    ),
    "a bigger chunk": (
        lambda m: setattr(m.state_dict_metadata[NORM].chunks[0], "sizes", torch.Size((33,))),
        HeaderError,
        r"is F32 \[32\], but",
    ),
    "past the end": (
        lambda m: set_info(m, offset=2**40),
        IncompleteError,
        r"(?s)truncated.*hint: copy or save the file again",
    ),
    "before the beginning": (lambda m: set_info(m, offset=-1), HeaderError, "not in a file of this folder"),
    "a file elsewhere": (lambda m: set_info(m, relative_path="../a"), HeaderError, "not in a file of this folder"),
    "an absolute path": (lambda m: set_info(m, relative_path="/etc/passwd"), HeaderError, "not in a file"),
    "a missing file": (
        lambda m: set_info(m, relative_path="a.distcp"),
        IncompleteError,
        r"(?s)missing.*hint: copy the missing file",
    ),
    "a name that is none": (lambda m: set_info(m, relative_path="\0"), HeaderError, "not in a file of this folder"),
    "compressed": (
        lambda m: set_info(m, transform_descriptors=["zstd"]),
        CheckpointError,
        r"(?s)transformed.*hint: save the checkpoint without extensions",
    ),
    "two models": (
        second_model,
        CheckpointError,
        r"(?s)several models, under 'model.', 'average.'.*hint: save the model that you want",
    ),
    "not metadata": (lambda m: m.__dict__.clear(), HeaderError, ""),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_are_named(case: str, saved: Path, model: Any) -> None:
    lie, error, words = LIES[case]
    edit(saved, lie)
    with pytest.raises(error, match=words or None):
        read_dcp_checkpoint(saved, model)


def bombs() -> dict[str, bytes]:
    nested = b"\x80\x04N" + b"\x85" * 100_000
    doubled = b"\x80\x04N" + b"".join(b"\x94h" + bytes([index]) + b"\x86" for index in range(200))
    return {
        "a long text that is not there": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"a",
        "bytes that are not there": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"a",
        "a memo far out": b"\x80\x04Nr\xff\xff\xff\xff.",
        "nested deep": nested + b".",
        "doubled many times": doubled + b".",
        "a doubled key": b"\x80\x04}" + doubled[2:] + b"Ns.",
        "a cycle": b"\x80\x04]\x94h\x00a.",
        "endless": b"\x80\x04" + b"N" * 1_000_000,
        "no protocol": b"",
        "half a surrogate": b"\x80\x04\x8c\x03\xed\xa0\x80.",
        "an extension": b"\x80\x02\x82\x01.",
        "a class by its instance": b"\x80\x02(i os\nsystem\n.",
        "a wrong mark": b"\x80\x04t.",
        "built on nothing": b"\x80\x04NNb.",
        "items for a list": b"\x80\x04]NNs.",
        "too little for a tuple": b"\x80\x04N\x86.",
    }


@pytest.mark.parametrize("case", bombs())
def test_bombs_cost_no_more_than_their_length(case: str, saved: Path, model: Any) -> None:
    bomb = bombs()[case]
    (saved / METADATA).write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(HeaderError):
        read_dcp_checkpoint(saved, model)
    assert tracemalloc.get_traced_memory()[1] < 2**20 + 200 * len(bomb)
    tracemalloc.stop()


def test_the_machine_reads_what_python_writes() -> None:
    for protocol in (2, 3, 4, 5):
        content = pickle.dumps({"a": [1, 2**40, -3, (1, 2, 3, 4)], "b": (None, True, False)}, protocol=protocol)
        table = read_pickle(content, frozenset(), "here")
        assert table.pairs == [("a", [1, 2**40, -3, (1, 2, 3, 4)]), ("b", (None, True, False))]  # type: ignore[attr-defined]


def test_text_with_an_odd_escape_is_refused_without_a_warning() -> None:
    with pytest.raises(HeaderError, match="uses the instruction STRING"):
        read_pickle(rb"S'\q'" + b"\n.", frozenset(), "here")
