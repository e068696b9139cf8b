"""State dicts read as data, with torch's own loader as the oracle; whatever is hostile is one clear error."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from plans.errors import CheckpointError, HeaderError, MigratorError
from runtime.checkpoint.files.safetensors import BITS
from runtime.checkpoint.pickled import pickle as pickle_reader
from runtime.checkpoint.pickled import state_dict
from runtime.checkpoint.pickled.state_dict import StateDict, read_state_dict
from runtime.checkpoint.pickled.tensors import TORCH_DTYPES, ArchivedTensor, parse_tensor
from tests.runtime.checkpoint.dcp.test_metadata import Evil, unzipped, zipped

DTYPES = [getattr(torch, name.removeprefix("torch.")) for name in TORCH_DTYPES]


def read(path: Path) -> StateDict[ArchivedTensor]:
    return read_state_dict(path, parse_tensor)


def saved(value: object, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def load(path: Path, tensor: ArchivedTensor) -> torch.Tensor:
    """Read a tensor's bytes from where the description says, through torch's own views."""
    content = bytearray(path.read_bytes()[tensor.storage.offset : tensor.storage.offset + tensor.storage.size])
    dtype = next(dtype for dtype in DTYPES if TORCH_DTYPES[str(dtype)] == tensor.storage.dtype)
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.as_strided(tensor.shape, tensor.strides, tensor.base)


def check_against_torch(path: Path, weights_only: bool = True) -> None:
    """Compare every value, and every offset, with what torch.load says."""
    found = read(path)
    loaded = torch.load(path, weights_only=weights_only)
    with FakeTensorMode():
        fakes = torch.load(path, weights_only=weights_only)
    assert list(found.tensors) == list(loaded)
    for name, tensor in found.tensors.items():
        expected, storage = loaded[name], fakes[name].untyped_storage()
        assert tensor.storage.offset == storage._checkpoint_offset
        assert tensor.storage.size == storage.nbytes()
        assert (tensor.shape, tensor.base) == (tuple(expected.shape), expected.storage_offset())
        if expected.numel():
            assert tensor.strides == expected.stride()
        values = load(path, tensor)
        assert values.dtype == expected.dtype
        same = (values.contiguous().reshape(-1).view(torch.uint8), expected.contiguous().reshape(-1).view(torch.uint8))
        assert torch.equal(*same), name
        stored = tensor.to_stored()
        assert (stored is None) == (not expected.is_contiguous()), name
        if stored is not None:
            assert stored.size == expected.nbytes
            bits = BITS[stored.dtype] // 8 * expected.storage_offset()
            assert stored.offset == storage._checkpoint_offset + (bits if expected.numel() else 0)


def test_every_dtype_and_view_is_where_torch_loads_it(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    state = {
        **{f"dtype.{dtype}": torch.randint(0, 100, (5, 3)).to(torch.float32).to(dtype) for dtype in DTYPES},
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "turned": base.t(),
        "slice": base[1:4, 2:5],
        "rows": base[2:4],
        "every other": base[::2, ::3],
        "one column": base[:, :1],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "frozen": torch.nn.Parameter(torch.arange(3), requires_grad=False),
    }
    check_against_torch(saved(state, tmp_path / "a.pt"))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_a_module_saves_is_read(protocol: int, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module[0].annotated = {"a set": {1}, "bytes": b"x"}
    check_against_torch(
        saved(module.state_dict(), tmp_path / "a.pt", pickle_protocol=protocol), weights_only=protocol == 2
    )


def test_tied_tensors_are_one_range(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    found = read(saved({"a": weight, "b": weight}, tmp_path / "a.bin")).tensors
    assert found["a"] == found["b"]


def test_archives_of_over_four_gigabytes_are_read(tmp_path: Path) -> None:
    """They are in zip64. Torch leaves out the data, so that the file takes no disk and the test no time."""
    state = {"a": torch.empty(3), "large": torch.empty(2**32 + 10, dtype=torch.uint8), "z": torch.empty(5, 5)}
    with torch.serialization.skip_data():
        path = saved(state, tmp_path / "a.pt")
    assert path.stat().st_size > 2**32
    with FakeTensorMode():
        fakes = torch.load(path)
    found = {name: (tensor.storage.offset, tensor.storage.size) for name, tensor in read(path).tensors.items()}
    storages = {name: fake.untyped_storage() for name, fake in fakes.items()}
    assert found == {name: (storage._checkpoint_offset, storage.nbytes()) for name, storage in storages.items()}


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
def test_a_model_saved_beside_other_state_is_found(key: str, tmp_path: Path) -> None:
    weight = torch.randn(3)
    optimizer = {"state": {0: {"exp_avg": weight * 2}}, "param_groups": [{"lr": 0.1}]}
    path = saved({"step": 3, "optimizer": optimizer, key: OrderedDict(w=weight, extra=7)}, tmp_path / "a.pt")
    found = read(path)
    assert torch.equal(load(path, found.tensors["w"]), weight)
    assert [str(left) for left in found.left_behind] == [
        "'step' in a.pt (beside the model)",
        "'optimizer' in a.pt (beside the model)",
        "'extra' in a.pt (no tensor)",
    ]


NOT_STATE_DICTS: dict[str, tuple[object, str]] = {
    "a list": ([torch.zeros(2)], "no dict, not a state dict"),
    "a module": (torch.nn.Linear(2, 2), r"an object of torch\.nn\.modules\.linear\.Linear"),
    "two models": ({"model": {"w": torch.zeros(2)}, "module": {"w": torch.zeros(2)}}, "only 'model', 'module'"),
    "no tensors": ({"lr": 1.0}, "only 'lr'"),
    "nothing": ({}, r"(?s)contains no tensors.*hint: save the model's weights alone"),
    "numbers as names": ({0: torch.zeros(2)}, "something without a name"),
}


@pytest.mark.parametrize("case", NOT_STATE_DICTS)
def test_what_is_no_state_dict_is_named(case: str, tmp_path: Path) -> None:
    value, words = NOT_STATE_DICTS[case]
    with pytest.raises(CheckpointError, match=words):
        read(saved(value, tmp_path / "a.pt"))


class Scaled(torch.Tensor):
    """A tensor with a class of its own, as quantizers have."""


SPECIAL: dict[str, tuple[Callable[[], object], str]] = {
    "a conjugate": (lambda: torch.zeros(2, dtype=torch.complex64).conj(), "_rebuild_tensor_v2"),
    "a negative": (lambda: torch.zeros(2, dtype=torch.complex64).conj().imag, "_rebuild_tensor_v2"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "_rebuild_sparse_tensor"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
    "of a class": (lambda: torch.ones(2).as_subclass(Scaled), r"test_state_dict\.Scaled"),
    "in a placeholder": (lambda: Holder(torch.ones(2)), r"test_state_dict\.Holder"),
}


class Holder:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("case", SPECIAL)
@pytest.mark.filterwarnings("ignore")
def test_only_a_tensor_that_an_unknown_name_makes_is_refused(case: str, tmp_path: Path) -> None:
    build, words = SPECIAL[case]
    with pytest.raises(
        HeaderError, match=rf"'odd' is not a plain tensor but made by .*{words}, which is not called"
    ) as caught:
        read(saved({"w": torch.ones(2), "odd": build()}, tmp_path / "a.pt"))
    assert caught.value.hint.startswith("save a plain tensor in its place")


def test_an_unknown_name_without_a_tensor_is_left_behind(tmp_path: Path) -> None:
    found = read(saved({"w": torch.ones(2), "holder": Holder(3), "path": tmp_path}, tmp_path / "a.pt"))  # type: ignore[arg-type]
    assert list(found.tensors) == ["w"]
    assert [str(left) for left in found.left_behind] == ["'holder' in a.pt (no tensor)", "'path' in a.pt (no tensor)"]


def test_a_name_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it could be: importing a module runs it."""
    mark = tmp_path / "mark"
    (tmp_path / "planted_module.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Thing: pass\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = types.ModuleType("planted_module")
    module.Thing = type("Thing", (), {"__module__": "planted_module"})  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "planted_module", module)
        path = saved({"w": torch.ones(2), "thing": module.Thing(), "class": module.Thing}, tmp_path / "a.pt")
    found = read(path)
    assert list(found.tensors) == ["w"]
    assert [left.name for left in found.left_behind] == ["'thing' in a.pt", "'class' in a.pt"]
    assert "planted_module" not in sys.modules
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "a check of the check"
    del sys.modules["planted_module"]


def nest_evil(position: str, evil: Evil) -> object:
    """Return a state dict with a payload in one position of what people save."""
    good = {"w": torch.ones(2)}
    return {
        "instead of the dict": evil,
        "as a value": {**good, "evil": evil},
        "as the first value": {"evil": evil, **good},
        "as a key": {**good, evil: torch.ones(2)},
        "in a list": {**good, "evil": [evil]},
        "as the state of an object": {**good, "evil": Holder(evil)},  # type: ignore[arg-type]
        "in a set": {**good, "evil": frozenset([evil])},
        "beside the model": {"model": good, "args": evil},
        "as the model": {"model": evil, "step": torch.ones(2)},
        "in the metadata of the dict": with_metadata(good, evil),
        "in place of a shape": {**good, "odd": Rebuilt(evil)},
    }[position]


def with_metadata(state: dict[str, torch.Tensor], evil: Evil) -> object:
    ordered = OrderedDict(state)
    ordered._metadata = evil  # type: ignore[attr-defined]
    return ordered


class Rebuilt:
    """Pickled as a tensor whose shape runs code."""

    def __init__(self, evil: Evil) -> None:
        self.evil = evil

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (torch.ones(2).storage(), 0, self.evil, (1,), False, OrderedDict())


POSITIONS = (
    "instead of the dict", "as a value", "as the first value", "as a key", "in a list", "as the state of an object",
    "in a set", "beside the model", "as the model", "in the metadata of the dict", "in place of a shape",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_planted_call_runs_in_no_position(position: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = saved(nest_evil(position, Evil(mark)), tmp_path / "a.pt", pickle_protocol=protocol)
    with contextlib.suppress(MigratorError):
        read(path)
    assert not mark.exists()


GOOD = {"w": torch.arange(32.0), "b": torch.arange(8.0)}


def good_archive() -> bytes:
    stream = io.BytesIO()
    torch.save(GOOD, stream)
    return stream.getvalue()


def parts() -> dict[str, bytes]:
    return unzipped(good_archive())


def doubled() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in [*parts().items(), ("data/2", b"\0" * 128)]:
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue().replace(b"archive/data/2", b"archive/data/0")


def edit_directory(name: bytes, field: int, form: str, value: int) -> bytes:
    """Return the archive with one number of a member's directory entry changed."""
    content = bytearray(good_archive())
    at = next(
        at
        for at in range(content.rfind(b"PK\x06\x06"), 0, -1)
        if content[at : at + 4] == b"PK\x01\x02" and content[at + 46 :].startswith(b"archive/" + name)
    )
    struct.pack_into(form, content, at + field, value)
    return bytes(content)


def offset_of(name: str) -> int:
    with zipfile.ZipFile(io.BytesIO(good_archive())) as archive:
        return archive.getinfo(f"archive/{name}").header_offset


def lie_about_size(size: int) -> bytes:
    content = bytearray(edit_directory(b"data/0", 20, "<L", size))
    at = content.rfind(b"archive/data/0") - 46
    struct.pack_into("<L", content, at + 24, size)
    return bytes(content)


def with_wide_size(size: int) -> bytes:
    """Return an archive whose directory gives a member's size in the extra field of zip64."""
    content = bytearray(zipped(parts()))
    extra = struct.pack("<2H2Q", 1, 16, size, size)
    name = content.rfind(b"archive/data/0")
    entry, end = name - 46, name + len("archive/data/0")
    struct.pack_into("<2L", content, entry + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    assert struct.unpack_from("<H", content, entry + 30) == (0,)
    struct.pack_into("<H", content, entry + 30, len(extra))
    content[end:end] = extra
    record = content.rfind(b"PK\x05\x06")
    (length,) = struct.unpack_from("<L", content, record + 12)
    struct.pack_into("<L", content, record + 12, length + len(extra))
    return bytes(content)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "is not a zip archive"),
    "cut in half": (lambda: good_archive()[:-400], "is not a zip archive"),
    "cut at its end": (lambda: good_archive()[:-1], "is not a zip archive"),
    "two members of one name": (doubled, "two members of the same name"),
    "overlapping members": (lambda: edit_directory(b"data/1", 42, "<L", offset_of("data/0")), "overlaps|another name"),
    "a member in another": (lambda: edit_directory(b"data/1", 42, "<L", offset_of("data/0") + 70), "overlaps"),
    "a member too long": (lambda: lie_about_size(2**20), "overlaps what follows"),
    "a member a little too long": (lambda: lie_about_size(132), "does not lie within its storage"),
    "a member too short": (lambda: lie_about_size(64), "does not lie within its storage"),
    "a zip64 member of exabytes": (lambda: with_wide_size(2**60), "overlaps what follows"),
    "compressed": (lambda: zipped(parts(), zipfile.ZIP_DEFLATED), "compressed"),
    "encrypted": (lambda: edit_directory(b"data/0", 8, "<H", 0x801), "encrypted"),
    "no description": (lambda: zipped({"data/0": b"x"}), "not an archive of torch.save"),
    "no storage": (lambda: zipped({name: value for name, value in parts().items() if name != "data/1"}), "lacks the"),
    "a program": (lambda: zipped({**parts(), "constants.pkl": b""}), r"of torch\.jit\.save"),
    "big-endian": (lambda: zipped({**parts(), "byteorder": b"big"}), "big-endian"),
    "a long description": (lambda: zipped({**parts(), "data.pkl": bytes(2**25 + 1)}), "description of 33554433 bytes"),
    "too many instructions": (
        lambda: zipped({**parts(), "data.pkl": b"N" * 200_001}),
        r"(?s)over 200,000 instructions.*hint: save the checkpoint again, in several files",
    ),
    "an instruction out of the list": (
        lambda: zipped({**parts(), "data.pkl": b"\x80\x02(cos\nsystem\nX\x01\0\0\0ai."}), "INST|not a whole pickle"
    ),
    "an object of text": (lambda: zipped({**parts(), "data.pkl": b"(ios\nsystem\n."}), "uses the instruction INST"),
    "an extension": (lambda: zipped({**parts(), "data.pkl": b"\x82\x01."}), "uses the instruction EXT1"),
    "a cut description": (lambda: zipped({**parts(), "data.pkl": parts()["data.pkl"][:-9]}), "not a whole pickle"),
    "a name twice": (lambda: zipped({**parts(), "data.pkl": twice()}), "'w' twice"),
    "shared lists without end": (lambda: zipped({**parts(), "data.pkl": shared_lists()}), "no tensors under"),
    "values shared by thousands": (lambda: zipped({**parts(), "data.pkl": much_shared()}), "more values beside"),
}  # fmt: skip


def twice() -> bytes:
    description = parts()["data.pkl"]
    assert description.count(b"X\x01\0\0\0b") == 1
    return description.replace(b"X\x01\0\0\0b", b"X\x01\0\0\0w")


def shared_lists() -> bytes:
    """Return a list of twice the list before, forty times over: terabytes, if every part were visited anew."""
    levels = b"".join(b"X\x04\0\0\0%04dcos\nsystem\nh%ch%c\x86Rq%c" % (n, n, n, n + 1) for n in range(40))
    return b"\x80\x02}(X\x01\0\0\0a]q\0" + levels + b"u."


def much_shared() -> bytes:
    """Return a dict of thousands of names for one long list."""
    names = b"".join(b"X\x04\0\0\0%04xh\0" % n for n in range(9000))
    return b"\x80\x02}(X\x01\0\0\0acos\nsystem\n(" + b"N" * 9000 + b"tRq\0" + names + b"u."


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_one_clear_error(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, words = HOSTILE[case]
    monkeypatch.setattr(pickle_reader, "_MAX_INSTRUCTIONS", 200_000)
    monkeypatch.setattr(state_dict, "_MAX_STEPS", 200_000)
    path = tmp_path / "a.pt"
    path.write_bytes(build())
    tracemalloc.start()
    try:
        with pytest.raises(MigratorError, match=words) as caught:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert peak < 400 * 2**20


def test_the_good_archives_of_these_cases_are_read(tmp_path: Path) -> None:
    for content in (good_archive(), zipped(parts()), with_wide_size(128)):
        (tmp_path / "a.pt").write_bytes(content)
        assert list(read(tmp_path / "a.pt").tensors) == ["w", "b"]
        assert torch.equal(load(tmp_path / "a.pt", read(tmp_path / "a.pt").tensors["w"]), GOOD["w"])


def test_the_payload_does_run_where_it_is_trusted(tmp_path: Path) -> None:
    path = saved({"w": torch.ones(2), "evil": Evil(tmp_path / "mark")}, tmp_path / "a.pt")
    torch.load(path, weights_only=False)
    assert (tmp_path / "mark").exists()
