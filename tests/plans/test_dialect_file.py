"""Dialects in files of the user's own: what is read, and what is refused with its key and a next step."""

from __future__ import annotations

from pathlib import Path

import pytest

from plans import dialect_file
from plans.dialect import dialect_names, load_dialect
from plans.dialect_file import is_dialect_file, list_dialect_files, load_named_dialect, read_dialect_file
from plans.errors import UsageError
from plans.named_file import read_named_toml

FORK = """
name = "our-fork"
extends = "transformers-5.23"
removed = ["local_params"]

[styles.our_colwise]
job = "both"
does = "input whole, output left sharded by feature"
output = "sharded"
placements = [{ place = "shard 0", parameter = "bias" }, { place = "shard -2" }]
[styles.our_colwise.means]
linear = "linear/out"
"parameter 3" = "parameter/out"
"""


def write(folder, text, name="fork.toml"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("name", dialect_names())
def test_dialects_that_ship_with_migrator_follow_the_schema(name):
    assert read_dialect_file(Path("plans/dialects", f"{name}.toml").absolute()) == load_dialect(name)


def test_a_fork_extends_a_release(tmp_path):
    fork, base = load_named_dialect(str(write(tmp_path, FORK))), load_dialect("transformers-5.23")
    assert fork.name == "our-fork"
    assert fork.styles.keys() ^ base.styles.keys() == {"local_params", "our_colwise"}
    assert fork.styles["our_colwise"].meaning("linear") == "linear/out"
    assert fork.expert_plan_needs == base.expert_plan_needs
    assert fork.expert_plan_refuses == base.expert_plan_refuses


def test_a_file_extends_another_one_and_is_named_after_itself(tmp_path):
    write(tmp_path, FORK)
    path = write(tmp_path, 'extends = "../fork.toml"\nnumbered_keys = true\nexpert_plan_needs = []\n', "sub/ours.toml")
    ours = read_dialect_file(path)
    assert (ours.name, ours.numbered_keys, ours.expert_plan_needs) == ("ours", True, ())
    assert "our_colwise" in ours.styles
    assert [file.resolve() for file in list_dialect_files(str(path))] == [path, tmp_path / "fork.toml"]


@pytest.mark.parametrize(
    ("name", "is_file"),
    [("./my.toml", True), ("my.toml", True), ("a/b", True), ("a\\b", True), ("transformers-5.23", False)],
)
def test_paths_are_told_from_names(name, is_file):
    assert is_dialect_file(name) is is_file


def test_the_documented_example_is_a_dialect(tmp_path):
    text = Path("docs/rewriting.md").absolute().read_text("utf-8").partition("```toml\n")[2].partition("```")[0]
    assert read_dialect_file(write(tmp_path, text)) == read_dialect_file(write(tmp_path, FORK, "same.toml"))


STYLE = '[styles.x]\njob = "both"\ndoes = "nothing"\n[styles.x.means]\n'


@pytest.mark.parametrize(
    ("text", "key", "problem", "hint"),
    [
        ("name = ", None, "is not valid TOML", "correct the syntax"),
        ("", "styles", "is empty", "extends"),
        ('nam = "x"', "nam", "is not a key of a dialect file", "did you mean name?"),
        ('name = "a b"', "name", "not a name", "letters"),
        ("name = 3", "name", "not a name", "letters"),
        ('extends = "transformers-5.22"', "extends", "is no dialect", "did you mean transformers-5.2"),
        ("extends = 5.23", "extends", "not a string", "write extends"),
        ('extends = "./absent.toml"', None, "cannot be read: No such file", "transformers-5.23"),
        ('extends = "./fork.toml"', "extends", "leads back to", "does not extend this one"),
        ('extends = "transformers-5.23"\nremoved = ["colwize"]', "removed", "'colwize', which is no style", "colwise?"),
        ("stage = " + "9" * 5000, None, "is not valid TOML", "correct the syntax"),
        ('name = "param-level"\nextends = "transformers-5.23"', "name", "ships with migrator", "another"),
        ('removed = "colwise"', "removed", "not a list of strings", "removed = ["),
        ("numbered_keys = 1", "numbered_keys", "not true or false", "true"),
        ('releases = ["5.23.0"]', "releases", "not a minor version", '"5.23"'),
        ("stage = -1", "stage", "not a whole number", "stage = 2"),
        ('expert_plan_needs = ["x"]', "expert_plan_needs", "not a list of strings", "["),
        (STYLE + "[foo]\nx = 1", "foo", "is not a key", "keys are name"),
        ("styles = 3", "styles", "not a table", "[styles]"),
        ("[styles]\nx = 3", "styles.x", "not a table", "[styles.x]"),
        ('[styles.x]\ndoes = "a"\nmeans = {}', "styles.x", "has no `job`", "job ="),
        ('[styles.x]\njob = "both"\ndoes = "a"', "styles.x", "has no `means`", "means ="),
        (STYLE.replace("both", "params"), "styles.x.job", "is 'params'", "did you mean parameter?"),
        (STYLE.replace("job", "plces = []\njob"), "styles.x.plces", "is not a key", "placements"),
        (STYLE.replace("job", 'output = "half"\njob'), "styles.x.output", "is 'half'", "whole, sharded"),
        (STYLE.replace("job", 'alias_of = "y"\njob'), "styles.x.alias_of", "'y', which is no style", "x"),
        (STYLE.replace("job", 'only = "pp"\njob'), "styles.x.only", "is 'pp'", "tp"),
        (STYLE.replace("job", 'placements = ["shard 0"]\njob'), "styles.x.placements[0]", "not a table", "["),
        (STYLE.replace("job", "placements = [{ rank = 2 }]\njob"), "styles.x.placements[0].place", "is missing", "DIM"),
        (
            STYLE.replace("job", 'placements = [{ place = "split 0" }]\njob'),
            "styles.x.placements[0].place",
            "is 'split 0', not a placement",
            "shard DIM",
        ),
        (
            STYLE.replace("job", 'placements = [{ place = "shard 0", owner = "conv" }]\njob'),
            "styles.x.placements[0].owner",
            "is 'conv'",
            "linear",
        ),
        (
            STYLE.replace("both", "module").replace("does", 'placements = [{ place = "shard 0" }]\ndoes'),
            "styles.x.placements",
            "module style shards none",
            "both",
        ),
        (STYLE + 'lienar = "linear/out"', "styles.x.means.lienar", "not a kind of thing", "linear"),
        (STYLE + 'linear = "linear/outt"', "styles.x.means.linear", "which is no meaning", "linear/out?"),
        (STYLE + 'linear = "parameter/out"', "styles.x.means.linear", "a meaning on parameter", "linear/out"),
        (STYLE + '"parameter 3" = "linear/out"', "styles.x.means.parameter 3", "a meaning on linear", "parameter/out"),
    ],
)
def test_what_breaks_the_schema_is_refused_with_its_key(tmp_path, text, key, problem, hint):
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_named_dialect(str(path))
    error = caught.value
    assert problem in error.message
    assert hint in error.hint
    assert error.data.get("key") == key
    assert str(tmp_path) in error.message


@pytest.mark.parametrize("name", ["./absent.toml", "absent.toml", "."])
def test_a_file_that_cannot_be_read_says_so(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no dialect|cannot be read") as caught:
        load_named_dialect(name)
    assert "transformers-5.23" in caught.value.hint


def test_each_file_of_a_chain_is_read_once(tmp_path, monkeypatch):
    for number in range(20):
        write(tmp_path, f'extends = "./m{number + 1}.toml"\n', f"m{number}.toml")
    write(tmp_path, FORK, "m20.toml")
    reads: list[Path] = []
    read = read_named_toml
    monkeypatch.setattr(dialect_file, "read_named_toml", lambda path, hint: (reads.append(path), read(path, hint))[1])
    assert "our_colwise" in read_dialect_file(tmp_path / "m0.toml").styles
    assert len([path for path in reads if path.parent == tmp_path]) == 21


def test_a_chain_without_end_is_refused(tmp_path):
    for number in range(40):
        write(tmp_path, f'extends = "./m{number + 1}.toml"\n', f"m{number}.toml")
    with pytest.raises(UsageError, match="more than 32 files"):
        read_dialect_file(tmp_path / "m0.toml")


def test_a_byte_order_mark_and_windows_line_ends_are_no_error(tmp_path):
    path = tmp_path / "fork.toml"
    path.write_bytes(b"\xef\xbb\xbf" + FORK.replace("\n", "\r\n").encode())
    assert read_dialect_file(path) == read_dialect_file(write(tmp_path, FORK, "same.toml"))


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    for text in ("./folder.toml", "./"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_dialect_file(write(tmp_path, f'extends = "{text}"\n'))
