"""Every plan of the installed transformers, to other dialects and back."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache, partial

import pytest

from codemods.models.describe import Model
from plans.decompose import apply_edits
from plans.dialect import PARAM_LEVEL, load_dialect
from plans.translate import translate

RELEASE = "transformers-5.23"
WITHOUT_EQUAL_ON_THE_BRANCH = {
    "all_reduce",
    "colwise",  # of three-dimensional parameters
    "ep_dispatch_experts",
    "local_params",
    "mla_kv_a_proj",
    "packed_rowwise",
    "replicate",
    "replicated_with_grad_allreduce",
}


@pytest.fixture(scope="module")
def plans(installed_transformers):
    """Every plan by (folder, class, kind), read with nothing of ours."""
    found = {}
    for path in sorted(installed_transformers.glob("models/*/*.py")):
        text = path.read_bytes()
        for node in ast.walk(ast.parse(text)) if b"_plan = {" in text else ():
            for statement in node.body if isinstance(node, ast.ClassDef) else ():
                match statement:
                    case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict(keys=keys) as value) if all(keys):
                        kind = re.fullmatch(r"(?:base_model)?_(tp|ep|sp)_plan", name)
                        if kind and all(isinstance(key, ast.Constant) for key in keys):
                            found[path, node.name, kind[1]] = ast.literal_eval(value)
    assert len(found) > 500
    return found


@cache
def model(folder):
    return Model(folder)


def describer(path, class_name):
    return partial(model(path.parent).describe, class_name=class_name)


def round_trip(plans, there):
    """Take every plan there and back; what is not named comes back as it was."""
    source, target = load_dialect(RELEASE), load_dialect(there)
    valid = target.styles.keys() | load_dialect(PARAM_LEVEL).styles.keys()
    edits, named = Counter(), Counter()
    for (path, class_name, kind), plan in plans.items():
        describe = describer(path, class_name)
        forth = translate(plan, source, target, describe, kind)
        moved = apply_edits(plan, forth.edits)
        back = translate(moved, target, source, describe, kind)
        assert list(apply_edits(moved, back.edits).items()) == list(plan.items()), (path.name, class_name)
        lost = {finding.key for finding in forth.findings}
        for key, style in moved.items():
            if key not in lost:
                assert style in valid, (path.name, key, style)
            assert plan[key] == style or key not in lost
        assert {finding.key for finding in back.findings} <= lost
        edits.update((edit.before, edit.style) for edit in forth.edits)
        named.update((plan[finding.key], finding.code) for finding in forth.findings)
    return edits, named


def test_every_key_is_described_and_could_exist(plans):
    keys = {(path, class_name, key) for (path, class_name, _), plan in plans.items() for key in plan}
    assert len(keys) > 2000
    unanswered = [place for place in keys if describer(*place[:2])(place[2]) is None]
    assert unanswered == []
    assert [place for place in keys if not model(place[0].parent).can_exist(place[2])] == []


def test_a_misspelt_key_could_not_exist(plans):
    """Of real keys with their last letter doubled nearly none can be created, the rest by other models' classes."""
    keys = {(path.parent, key + key[-1]) for (path, _, _), plan in plans.items() for key in plan}
    accepted = [place for place in keys if model(place[0]).can_exist(place[1])]
    assert len(accepted) < len(keys) / 50


def test_there_and_back_over_the_branch(plans):
    edits, named = round_trip(plans, "dtensor")
    assert set(edits) == {
        ("colwise_gather_output", "colwise_allgather"),
        ("embedding_colwise", "colwise_allgather"),
        ("embedding_rowwise", "vocab_allreduce"),
        ("moe_tp_experts", "moe_experts_allreduce"),
        ("packed_colwise", "moe_tp_gate_up_colwise"),
        ("rowwise", "moe_tp_down_rowwise"),
        ("rowwise", "rowwise_allreduce"),
        ("rowwise_split_input", "vocab_allreduce"),
    }
    assert {code for _, code in named} == {"MIG401"}
    on_a_list = named.pop(("colwise_gather_output", "MIG401"))
    assert on_a_list == 1, "the heads of one model are a list of Linear modules, which no style can hook"
    assert {style for style, _ in named} == WITHOUT_EQUAL_ON_THE_BRANCH
    assert sum(edits.values()) > 4 * sum(named.values())


def test_there_and_back_over_an_older_release(plans):
    edits, named = round_trip(plans, "transformers-5.16")
    assert set(edits) == {("embedding_colwise", "colwise_gather_output")}
    assert {style for style, _ in named} == {
        "colwise_gather_output",
        "ep_dispatch_experts",
        "local_params",
        "replicate",
    }


def test_to_itself_nothing_changes(plans):
    edits, named = round_trip(plans, RELEASE)
    assert (edits, named) == (Counter(), Counter())


@pytest.mark.parametrize("there", ["dtensor-before", "transformers-4.57", "transformers-5.3", "transformers-5.21"])
def test_every_other_dialect_takes_what_it_can_and_gives_it_back(plans, there):
    edits, named = round_trip(plans, there)
    assert named, "each of them lacks something"
    assert all(before != after for before, after in edits)
