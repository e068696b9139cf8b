"""Files that a user names: what is no small TOML file is refused at once, whatever it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from plans.dialect_file import load_named_dialect
from plans.errors import UsageError
from plans.named_file import read_named_toml


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_large(path: Path) -> None:
    path.write_bytes(b"# pad\n" * 10**6)


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (make_pipe, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (Path.mkdir, "is not a regular file|cannot be read: Is a directory"),
        (lambda path: None, "cannot be read: No such file"),
        (make_large, "over 1,048,576 bytes, more than any such file has"),
        (make_sparse, "over 1,048,576 bytes, more than any such file has"),
    ],
)
def test_what_is_no_small_file_is_refused_at_once(make: object, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "fork.toml"
    assert callable(make)
    make(path)
    with pytest.raises(
        UsageError, match=rf"(?s)fork.toml: ({problem}).*hint: name a TOML file, or one of the dialects"
    ):
        load_named_dialect(str(path))


@pytest.mark.parametrize("content", [b"\xff", b"a = ", b"a = " + b"[" * 10**5, b"a = " + b"9" * 5000])
def test_what_is_no_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "fork.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"(?s)is not valid TOML.*hint: correct the syntax of the file"):
        read_named_toml(path, "name another")


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "fork.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert read_named_toml(path, "name another") == {"a": 1}
