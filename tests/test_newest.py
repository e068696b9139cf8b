"""`make newest`: what it compares, how it reads sizes and results, and that it stops before large downloads."""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
import venv
from collections.abc import Iterator
from pathlib import Path

import pip
import pytest
import transformers
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

import benchmarks.newest
from benchmarks.newest import Download, NewestError, check_size, format_table, list_downloads, main, read_summary
from benchmarks.newest_facts import SWEEP, collect_facts, compare, compare_sweep, load_known, read_outcomes
from plans.dialect import dialect_for_release

VERSION = transformers.__version__
KNOWN_OUTCOMES = {("A", "tp"): "passed", ("A", "ep"): "refused", ("B", "tp"): "not instantiated", ("B", "ep"): "passed"}


def differing(rows) -> dict[str, str]:
    return {row.what: row.found for row in rows if row.differs}


def test_the_facts_of_the_installed_release_are_its_own() -> None:
    facts = collect_facts()
    assert facts.styles == set(ALL_PARALLEL_STYLES)
    assert facts.fields == {field.name for field in dataclasses.fields(DistributedConfig)}
    assert {"base_model_tp_plan", "base_model_pp_plan", "_tp_plan", "_fsdp_plan"} <= facts.plans
    assert {"Chunk", "Concatenate", "MergeModulelist", "SplitModulelist"} <= facts.operations


def test_the_pinned_release_has_nothing_unknown() -> None:
    pinned = dict(line.split("==") for line in Path("constraints.txt").read_text("utf-8").split() if "==" in line)
    if pinned["transformers"] != VERSION:
        pytest.skip("the installed release is not the pinned one")
    assert differing(compare(VERSION, collect_facts(), load_known(VERSION))) == {}


@pytest.mark.parametrize(
    ("field", "name", "expected"),
    [
        ("styles", "colwise_twice", {"new styles", "dialect"}),
        ("operations", "Untie", {"new conversion operations"}),
        ("plans", "base_model_xp_plan", {"new plan attributes"}),
        ("fields", "cp_size", {"new fields of DistributedConfig"}),
    ],
)
@pytest.mark.parametrize("version", [VERSION, "99.0.0"])
def test_what_is_planted_in_the_installed_release_is_found(version: str, field: str, name: str, expected: set) -> None:
    known = load_known(version)
    found = dataclasses.replace(known, **{field: getattr(known, field) | {name}})
    rows = differing(compare(version, found, known))
    assert rows.keys() == expected
    assert name in [found for what, found in rows.items() if what != "dialect"]


@pytest.mark.usefixtures("_planted")
def test_what_a_release_registers_and_declares_is_collected() -> None:
    rows = differing(compare(VERSION, collect_facts(), load_known(VERSION)))
    assert rows["new styles"] == "colwise_twice"
    assert rows["new plan attributes"] == "base_model_xp_plan"
    assert "cp_size" in rows["new fields of DistributedConfig"]


@pytest.fixture
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wider(DistributedConfig):
        cp_size: int | None = None

    mapping = {**dict(ALL_PARALLEL_STYLES), "colwise_twice": object()}
    monkeypatch.setattr("transformers.distributed.DistributedConfig", dataclasses.dataclass(Wider))
    monkeypatch.setattr("transformers.distributed.tensor_parallel.ALL_PARALLEL_STYLES", mapping)
    monkeypatch.setattr(transformers.PreTrainedConfig, "base_model_xp_plan", None, raising=False)


def test_a_dropped_style_makes_another_dialect() -> None:
    known = load_known(VERSION)
    found = dataclasses.replace(known, styles=known.styles - {"colwise"})
    rows = differing(compare(VERSION, found, known))
    assert rows["dialect"].startswith(f"not that of {dialect_for_release(VERSION).name}")
    assert rows["styles gone"] == "colwise"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {}),
        ({("A", "tp"): "differs"}, {"classes wrong": "A (tp)"}),
        ({("B", "tp"): "differs"}, {"classes wrong": "B (tp)"}),
        ({("A", "tp"): "not instantiated"}, {"classes wrong": "A (tp)"}),
        ({("B", "ep"): "refused"}, {"families refused": "B (ep)"}),
        ({("A", "tp"): "no plan"}, {"plans gone": "A (tp)"}),
        ({("C", "tp"): "passed"}, {}),
        ({("C", "tp"): "refused"}, {"families refused": "C (tp)"}),
        ({("C", "tp"): "not instantiated"}, {"classes wrong": "C (tp)"}),
    ],
)
def test_outcomes_of_the_sweep_differ_where_they_are_worse_than_known(changed: dict, expected: dict) -> None:
    assert differing(compare_sweep(KNOWN_OUTCOMES | changed, KNOWN_OUTCOMES)) == expected


def test_a_sweep_without_rows_is_a_difference() -> None:
    assert "sweep" in differing(compare_sweep({}, KNOWN_OUTCOMES))


def test_the_page_of_the_sweep_is_read_as_it_counts_itself() -> None:
    page = SWEEP.read_text("utf-8")
    outcomes = read_outcomes(page)
    counted = {
        mode: [*map(int, page.partition(f"\n| {mode}=2")[2].partition("\n")[0].partition(" | ")[2].split("|")[:-1])]
        for mode in ("tp", "ep", "tp_ep tp=2 ep")
    }
    for label, (passed, refused, *_rest) in counted.items():
        found = [outcome for (_, mode), outcome in outcomes.items() if mode == label.split()[0]]
        assert found.count("passed") == passed
        assert found.count("refused") == refused
        assert sum(counted[label]) == len(found) == len(outcomes) / 3


@pytest.mark.parametrize(
    ("output", "code", "expected"),
    [
        ("...\n3 passed, 1 skipped in 2.00s\n", 0, ("3 passed, 1 skipped", False)),
        ("F\n1 failed, 3 passed in 2.00s\n", 1, ("1 failed, 3 passed", True)),
        ("s\n4 skipped in 0.10s\n", 0, ("4 skipped", True)),
        ("1 error in 0.10s\n", 2, ("1 error", True)),
        ("", 5, ("did not run, exit code 5", True)),
        ("3 passed in 1s\nSegmentation fault\n", -11, ("did not run, exit code -11", True)),
    ],
)
def test_only_tests_that_ran_and_passed_are_no_difference(output: str, code: int, expected: tuple) -> None:
    assert read_summary(output, code) == expected


def test_the_table_shows_versions_and_differences() -> None:
    lines = list(
        format_table({"torch": "2.13.0", "transformers": "5.24.0"}, [("new styles", "a|b", True), ("x", "y", False)])
    )
    assert lines[1] == "| torch 2.13.0, transformers 5.24.0 | | |"
    assert lines[3:] == ["| new styles | a/b | **differs** |", "| x | y | ok |"]


@pytest.fixture
def index() -> Iterator[str]:
    """Serve files of any size, without their content."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            size = self.path.rpartition("-")[2]
            self.send_response(404 if size == "absent" else 200)
            if size.isdigit():
                self.send_header("Content-Length", size)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def report(*urls: str) -> dict:
    packages = [
        {"metadata": {"name": f"p{i}", "version": "1"}, "download_info": {"url": url}} for i, url in enumerate(urls)
    ]
    return {"install": packages}


@pytest.mark.parametrize(
    ("paths", "fits"),
    [(["-999999999"], True), (["-600000000", "-600000000"], False), (["-10", "-absent"], False), (["-none"], False)],
)
def test_the_size_is_known_before_anything_is_downloaded(index: str, paths: list[str], fits: bool) -> None:
    downloads = list_downloads(report("file:///opt/torch.whl", *(f"{index}/file{path}" for path in paths)))
    assert downloads[0] == Download("p0 1", 0)
    if fits:
        assert check_size(downloads, 10**9).startswith("1.00 GB to download")
    else:
        with pytest.raises(NewestError, match=r"GB to download.*more than 1 GB without being asked; add ANY_SIZE=1"):
            check_size(downloads, 10**9)
    assert "to download" in check_size(downloads, None)


def test_a_run_that_cannot_be_made_exits_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """No package of this version exists; pip says so, whether or not an index is reached.

    The environment borrows the pip of this one, for installing its own takes longer than all the rest.
    """

    def create(folder: Path, **_: object) -> None:
        venv.EnvBuilder().create(folder)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "pip.pth").write_text(str(Path(pip.__file__).parents[1]))

    monkeypatch.setattr("benchmarks.newest.venv.create", create)
    monkeypatch.setattr(benchmarks.newest, "FOLDER", tmp_path / "env")
    monkeypatch.setattr(benchmarks.newest, "PYTHON", tmp_path / "env/bin/python")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["--transformers", "0.0.0.1"]) == 2
    assert "failed with" in capsys.readouterr().err


def test_the_rows_are_what_the_exit_code_says(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(benchmarks.newest, "install", lambda wanted, limit: {"torch": "1"})
    monkeypatch.setattr(benchmarks.newest, "run_tests", lambda name, files: (name, "1 passed", False))
    for differs in (False, True):
        row = json.loads(json.dumps(["new styles", "none", differs]))
        monkeypatch.setattr(benchmarks.newest, "compare_facts", lambda row=row: [tuple(row)])
        assert main([]) == int(differs)
        assert "| new styles | none |" in capsys.readouterr().out
