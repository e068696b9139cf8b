"""`migrator explain`, from the rules' own data."""

from __future__ import annotations

import json

import pytest

from plans.rule import load_rules
from tests.migrator.source_trees import migrator


def test_every_rule_is_listed(tmp_path):
    done = migrator("explain", cwd=tmp_path)
    assert done.returncode == 0
    printed = done.stdout.decode()
    assert [line.split()[0] for line in printed.splitlines() if line.lstrip().startswith("MIG")] == list(load_rules())


@pytest.mark.parametrize("code", load_rules())
def test_every_rule_is_fully_explained(tmp_path, code):
    rule = load_rules()[code]
    done = migrator("explain", code, cwd=tmp_path)
    printed = done.stdout.decode()
    assert done.returncode == 0
    assert printed.startswith(f"{code} {rule.name}, {rule.severity}: ")
    assert rule.explanation.strip() in printed
    assert printed.rstrip().endswith(rule.hint)
    changed = set(rule.after.strip().splitlines()) - set(rule.before.strip().splitlines())
    assert {line[2:] for line in printed.splitlines() if line.startswith("+ ")} == changed


def test_names_work_and_case_does_not_matter(tmp_path):
    wanted = migrator("explain", "MIG001", cwd=tmp_path).stdout
    assert migrator("explain", "mig001", cwd=tmp_path).stdout == wanted
    assert migrator("explain", "expert-gate-up", cwd=tmp_path).stdout == wanted


def test_json(tmp_path):
    rows = json.loads(migrator("explain", "--format", "json", cwd=tmp_path).stdout)
    assert [row["code"] for row in rows] == list(load_rules())
    rule = json.loads(migrator("explain", "MIG003", "--format", "json", cwd=tmp_path).stdout)
    assert rule == next(row for row in rows if row["code"] == "MIG003")
    assert rule["before"] != rule["after"]


@pytest.mark.parametrize(("code", "near"), [("MIG0001", "MIG001"), ("expert-gateup", "expert-gate-up")])
def test_an_unknown_code_names_similar_ones(tmp_path, code, near):
    done = migrator("explain", code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert near in done.stderr.decode().splitlines()[1]
    assert migrator("explain", "zzz", cwd=tmp_path).stderr.decode().endswith("lists all rules\n")
