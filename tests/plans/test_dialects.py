"""Every dialect file, compared with a strict schema, known facts of each release, and transformers itself."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

import plans.dialect
from plans.dialect import PARAM_LEVEL, dialect_for_release, dialect_names, load_dialect
from plans.errors import PlanError
from plans.model_facts import TargetKind
from plans.placement import Packed, Placement, Replicate, Shard, normalize_placement
from plans.style import OwnerKind, StyleJob
from plans.translate import load_meanings

FOLDER = Path(plans.dialect.__file__).with_name("dialects")
RELEASES = [
    *["4.57", "5.0", "5.3", "5.6", "5.8", "5.9", "5.10", "5.12", "5.14", "5.15"],
    *["5.16", "5.17", "5.18", "5.19", "5.20", "5.21", "5.22", "5.23", "5.24"],
]
STYLES = {  # how many each vocabulary registers
    "transformers-4.57": 13,
    "transformers-5.3": 14,
    "transformers-5.6": 15,
    "transformers-5.10": 18,
    "transformers-5.16": 19,
    "transformers-5.19": 20,
    "transformers-5.21": 22,
    "transformers-5.23": 20,
    "dtensor-before": 14,
    "dtensor-intermediate": 19,
    "dtensor-param-only": 18,
    "dtensor": 19,
}
THINGS = {
    "linear",
    "embedding",
    "module",
    "experts",
    "expert-parallel",
    "unsharded experts",
    "parameter 1",
    "parameter 2",
    "parameter 3",
}
FILE_FIELDS = {"name", "releases", "stage", "extends", "removed", "styles"} | {
    "numbered_keys",
    "expert_plan_needs",
    "expert_plan_refuses",
}
STYLE_FIELDS = {"job", "does", "output", "placements", "means", "only", "alias_of"}
ROW_FIELDS = {"place", "owner", "rank", "parameter"}

dialects = pytest.mark.parametrize("name", dialect_names())


@dialects
def test_the_file_follows_the_schema(name):
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))
    assert table["name"] == name
    assert table.keys() <= FILE_FIELDS
    assert all(isinstance(release, str) for release in table["releases"])
    assert ("stage" in table) == name.startswith("dtensor")
    named = {
        *table.get("expert_plan_refuses", ()),
        *(style for some in table.get("expert_plan_needs", ()) for style in some),
    }
    assert named <= load_dialect(name).styles.keys() | {"ep_router"}, "5.23 still knows the name, to refuse it"
    for style, row in table["styles"].items():
        assert {"job", "does", "means"} <= row.keys() <= STYLE_FIELDS, style
        assert row["job"] in get_args(StyleJob)
        assert row.get("output", "sharded") == "sharded", "whole is the default"
        assert row.get("only", "ep") == "ep"
        assert row["does"].strip()
        assert row["means"].keys() <= THINGS
        assert set(row["means"].values()) <= load_meanings().keys()
        for placement in row.get("placements", ()):
            assert {"place"} <= placement.keys() <= ROW_FIELDS
            assert placement.get("owner", "linear") in get_args(OwnerKind)


@dialects
def test_removed_styles_existed_in_the_base(name):
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))
    inherited = load_dialect(table["extends"]).styles if "extends" in table else {}
    assert set(table.get("removed", ())) <= inherited.keys()
    assert not set(table.get("removed", ())) & table["styles"].keys()
    for style, row in table["styles"].items():
        if style in inherited:
            fields = ("job", "does", "output", "rules", "means", "only", "alias_of")
            before, after = inherited[style], load_dialect(name).styles[style]
            assert any(getattr(before, field) != getattr(after, field) for field in fields), f"{style}: nothing new"
        assert row


def test_every_release_has_one_dialect():
    spoken = [release for name in dialect_names() for release in load_dialect(name).releases]
    assert sorted(spoken, key=RELEASES.index) == RELEASES
    assert dialect_for_release("4.57.6").name == dialect_for_release("5.0.0").name == "transformers-4.57"
    assert dialect_for_release("5.13.0").name == "transformers-5.10"


def test_the_vocabularies_have_the_sizes_they_were_released_with():
    assert {name: len(load_dialect(name).styles) for name in dialect_names() if name != PARAM_LEVEL} == STYLES


def test_the_installed_transformers_registers_these_names(installed_transformers):
    import_module("transformers.modeling_utils")  # registers every style, expert parallel ones too
    from transformers import __version__
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    spoken = dialect_for_release(__version__)
    if __version__.startswith(spoken.releases[-1]):
        assert spoken.styles.keys() == set(ALL_PARALLEL_STYLES.keys())


@pytest.mark.parametrize(
    ("dialect", "style", "owner", "rank", "parameter", "expected"),
    [
        ("transformers-4.57", "local_packed_rowwise", "module", 3, "gate_up_proj", Packed(2, 2)),
        ("transformers-4.57", "local_rowwise", "linear", 2, "weight", Shard(1)),
        ("transformers-4.57", "local_rowwise", "module", 1, "sinks", None),
        ("transformers-4.57", "grouped_gemm", "module", 3, "down_proj", Shard(0)),
        ("transformers-5.3", "packed_colwise", "module", 3, "gate_up_proj", Packed(1, 2)),
        ("transformers-5.3", "rowwise", "linear", 1, "bias", Replicate()),
        ("transformers-5.3", "embedding_rowwise", "embedding", 2, "weight", Shard(0)),
        ("transformers-5.6", "embedding_colwise", "embedding", 2, "weight", Shard(1)),
        ("transformers-5.16", "colwise_gather_output", "embedding", 2, "weight", Shard(1)),
        ("dtensor-before", "moe_experts_allreduce", "module", 3, "gate_up_proj", Packed(1, 2)),
        ("dtensor-before", "moe_experts_allreduce", "module", 2, "gate_up_proj_bias", None),
        ("dtensor-intermediate", "moe_experts_allreduce", "module", 3, "gate_up_proj", None),
        ("dtensor-intermediate", "moe_gate_up_colwise_alt", "module", 3, "gate_up_proj", Packed(2, 2)),
        ("dtensor", "colwise", "module", 3, "gate_up_proj", Shard(0)),
        ("dtensor", "rowwise_allreduce", "module", 3, "down_proj", Shard(1)),
        ("dtensor", "packed_colwise", "module", 3, "gate_up_proj", None),
        ("dtensor", "packed_colwise", "linear", 1, "bias", Packed(0, 2)),
        ("dtensor", "vocab_allreduce", "embedding", 2, "weight", Shard(0)),
    ],
)
def test_placements_of_each_dialect(dialect, style, owner, rank, parameter, expected):
    assert load_dialect(dialect).style(style, "k").placement(owner, rank, parameter) == expected


@dialects
def test_meanings_agree_with_placements(name):
    """Where a meaning says a tensor goes is where the style's placement rows put it."""
    for style in load_dialect(name).styles.values():
        for thing, meaning in style.means.items():
            known = load_meanings()[meaning]
            owner = thing if thing in ("linear", "embedding") else "module"
            if thing in ("linear", "embedding"):
                assert style.placement(owner, 2, "weight") == placed(known.weight, 2), (style.name, thing)
            if thing == "linear":
                assert style.placement(owner, 1, "bias") == placed(known.bias, 1), (style.name, thing)
            if thing.startswith("parameter"):
                rank = int(thing.removeprefix("parameter "))
                assert style.placement(owner, rank, "a") == placed(known.weight, rank), (style.name, thing)
            if thing == "module" and style.job == "module":
                assert style.rules == ()


def test_a_style_for_a_dim_that_the_parameter_lacks_is_refused():
    style = load_dialect(PARAM_LEVEL).styles["moe_tp_gate_up_colwise"]
    with pytest.raises(PlanError, match=r"bias: the style moe_tp_gate_up_colwise requires Packed\(-2, 2\), but"):
        style.placement("module", 1, "bias")


def placed(text: str, rank: int) -> Placement:
    table = {"replicate": Replicate, "shard": Shard, "packed": Packed}
    kind, *numbers = text.split()
    return normalize_placement(table[kind](*map(int, numbers)), rank)


@dialects
def test_output_and_meaning_agree_on_sharded_features(name):
    for style in load_dialect(name).styles.values():
        if meaning := style.means.get("linear"):
            expected = "sharded" if "sharded by feature" in load_meanings()[meaning].output else "whole"
            assert style.output == expected or style.job == "parameter", style.name


def test_no_two_meanings_are_the_same():
    described = {}
    for name, known in load_meanings().items():
        facts = (known.on, known.weight, known.bias, known.input, known.output, known.forward, known.backward)
        assert facts not in described, (name, described.get(facts))
        described[facts] = name


def test_every_meaning_is_defined_and_used():
    used = {
        meaning
        for name in dialect_names()
        for style in load_dialect(name).styles.values()
        for meaning in style.means.values()
    }
    assert used == load_meanings().keys()
    for known in load_meanings().values():
        assert known.on in {*THINGS, *get_args(TargetKind)}
        for other in filter(None, (known.becomes, known.within)):
            assert other in load_meanings()
        assert not known.becomes or load_meanings()[known.becomes].on == known.on
        assert not known.within or known.becomes


@dialects
def test_an_alias_is_the_style_that_replaced_it(name):
    styles = load_dialect(name).styles
    for style in styles.values():
        if style.alias_of:
            assert replace(styles[style.alias_of], name=style.name, alias_of=style.alias_of) == style


def test_one_name_with_two_meanings():
    old, new, branch = (load_dialect(name).styles for name in ("transformers-4.57", "transformers-5.23", "dtensor"))
    assert old["replicate"].meaning("module") != new["replicate"].meaning("module")
    assert old["sequence_parallel"].meaning("module") != new["sequence_parallel"].meaning("module")
    assert branch["packed_colwise"].meaning("linear") != new["packed_colwise"].meaning("linear")
    assert branch["packed_colwise"].meaning("parameter 3") is None
    middle = load_dialect("transformers-5.6").styles["embedding_colwise"]
    assert middle.meaning("embedding") != new["embedding_colwise"].meaning("embedding")
    assert new["colwise"].meaning("embedding") is None
    assert load_dialect("transformers-5.16").styles["colwise"].meaning("embedding") == "embedding/hidden"
