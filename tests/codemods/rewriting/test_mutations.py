"""Mutated inputs: real configurations cut, spliced and overwritten; no crash, no hang, no file damaged."""

from __future__ import annotations

import ast
import random
import shutil

import pytest

from codemods.checking.check import check_paths
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes
from tests.codemods.helpers import PACKED, REGULAR
from tests.codemods.reading.test_code_built import PER_LAYER, PER_LAYER_AFTER

BATCH = 100


@pytest.fixture(scope="module")
def seeds(installed_transformers):
    models = installed_transformers / "models"
    names = ("mixtral", "qwen3_moe", "deepseek_v3", "llama4", "aria", "gpt_oss")
    real = [(models / name / f"configuration_{name}.py").read_bytes() for name in names]
    return [*real, PACKED.encode(), PER_LAYER.encode(), PER_LAYER_AFTER.encode()]


def mutate(data, chance):
    """Damage bytes in one of several ways, most of them near a plan."""
    at = chance.randrange(len(data) + 1)
    plan = data.find(b"_plan")
    if plan >= 0 and chance.random() < 0.7:
        at = min(len(data), plan + chance.randrange(600))
    match chance.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:]
        case 2:
            return data[:at] + data[at + chance.randrange(1, 40) :]
        case 3:
            start = chance.randrange(len(data))
            return data[:at] + data[start : start + chance.randrange(1, 200)] + data[at:]
        case 4:
            return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
        case 5:
            old = chance.choice([b'"', b"{", b"}", b":", b",", b"\n", b" ", b"experts", b"*", b"'"])
            return data.replace(old, chance.choice([b"", b"'''", b"{", b"\\", b"\r", b"\0", b"**", b"(", b"f'"]), 3)
        case _:
            return chance.choice([b"\xef\xbb\xbf", b"# coding: latin-1\n", b"# coding: nope\n", b"\0"]) + data


def run_batch(folder, chance, texts):
    shutil.rmtree(folder, ignore_errors=True)
    before = {}
    for number in range(BATCH):
        model = folder / f"m{number}"
        model.mkdir(parents=True)
        path = model / f"configuration_m{number}.py"
        before[path] = mutate(chance.choice(texts), chance)
        path.write_bytes(before[path])
        modeling = mutate(REGULAR.encode(), chance) if chance.random() < 0.2 else REGULAR.encode()
        (model / f"modeling_m{number}.py").write_bytes(modeling)
    check_paths([folder], source="transformers-5.23")
    outcome = plan_rewrites([folder])
    assert write_changes(outcome.changes).errors == ()
    changed = {change.path for change in outcome.changes}
    for path, data in before.items():
        if path not in changed:
            assert path.read_bytes() == data
        else:
            ast.parse(path.read_bytes())
            assert path.read_bytes().count(b"\n") >= data.count(b"\n")
    assert plan_rewrites([folder]).changes == ()
    return len(changed)


def run(folder, seeds, count):
    chance = random.Random(20_240_607)
    return sum(run_batch(folder, chance, seeds) for _ in range(count // BATCH))


def test_mutated_inputs_do_no_harm(tmp_path, seeds):
    assert run(tmp_path / "tree", seeds, 300) > 15, "some of them still hold a whole plan"


@pytest.mark.full
def test_ten_thousand_mutated_inputs_do_no_harm(tmp_path, seeds):
    assert run(tmp_path / "tree", seeds, 10_000) > 500
