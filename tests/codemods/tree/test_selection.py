"""Ignore comments: the lines they apply to, what they prevent, and when they are unused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codemods.checking.check import check_paths
from codemods.files.config import Configuration
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes
from codemods.tree.outcome import find_unused_comments
from codemods.tree.selection import (
    Selection,
    Suppressions,
    find_suppressed_lines,
    find_unused_ignores,
    read_ignores,
)
from tests.codemods.helpers import MIGRATED, PACKED, REGULAR, codes, write_tree
from tests.migrator.source_trees import COPY, MODELING, OWNER, family, texts

GATE_UP, DOWN = '"packed_colwise",', '"rowwise",'
COMMENT = "  # migrator: ignore[MIG001]"


def spoken_of(text: str) -> list[tuple[int, tuple[str, ...]]]:
    return [(ignore.target_line, ignore.codes) for ignore in read_ignores(text.encode())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1  # migrator: ignore[MIG001]\ny = 2\n", [(1, ("MIG001",))]),
        ("# migrator: ignore[MIG001]\ny = 2\n", [(2, ("MIG001",))]),
        ("# migrator: ignore[MIG001]\n# because\n\ny = 2\n", [(4, ("MIG001",))]),
        ("x = [\n    # migrator: ignore[MIG001]\n    1,\n]\n", [(3, ("MIG001",))]),
        ("x = 1  # noqa: E501  # migrator:ignore [ MIG001 , MIG002 ] as agreed\n", [(1, ("MIG001", "MIG002"))]),
        ("x = 1  # migrator: ignore[MIG001] migrator: ignore[MIG002]\n", [(1, ("MIG001",)), (1, ("MIG002",))]),
        ("x = 1\r# migrator: ignore[MIG001]\ry = 2\r", [(3, ("MIG001",))]),
        ("x = 1  # migrator: ignore\n", [(1, ())]),
        ("x = 1  # migrator: ignore[]\n", [(1, ())]),
        ("x = 1\n# migrator: ignore[MIG001]", [(2, ("MIG001",))]),
        ("x = 1  # MIGRATOR: Ignore[MIG001]\n", [(1, ("MIG001",))]),
    ],
)
def test_what_a_comment_speaks_of(text, expected):
    assert spoken_of(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        'x = "# migrator: ignore[MIG001]"\n',
        '"""\n# migrator: ignore[MIG001]\n"""\n',
        "x = f'''\n# migrator: ignore[MIG001] {y}\n'''\n",
        "x = 1  # migrator: ignored[MIG001]\n",
        "x = 1  # mig ignore[MIG001]\n",
    ],
)
def test_what_only_looks_like_one_is_none(text):
    assert spoken_of(text) == []


@pytest.mark.parametrize("text", ["x = (  # migrator: ignore[MIG001]\n", "\xff"])
def test_text_that_is_no_python_has_none(text):
    assert read_ignores(text.encode("latin-1") + b"# migrator:") == ()


def test_a_comment_silences_its_codes_on_its_line_only():
    ignores = read_ignores(b"x = 1  # migrator: ignore[MIG001]\n")
    assert find_suppressed_lines(ignores, [1], "MIG001") == {1}
    assert find_suppressed_lines(ignores, range(1, 4), "MIG001") == {1}
    assert find_suppressed_lines(ignores, [1], "MIG002") == frozenset()
    assert find_suppressed_lines(ignores, [2, 3], "MIG001") == frozenset()


def test_comments_of_no_use_are_found():
    ignores = read_ignores(
        b"x = 1  # migrator: ignore[MIG001, MIG002]\n# migrator: ignore\n# migrator: ignore[MIG999]\n"
    )
    found = [(line, finding.code) for line, finding in find_unused_ignores(ignores, {(1, "MIG001")})]
    assert found == [(1, "MIG901"), (2, "MIG902"), (3, "MIG902")]
    messages = [finding.message for _, finding in find_unused_ignores(ignores, set())]
    assert "MIG001" in messages[0]
    assert "{" not in "".join(messages)


def rewritten(root, configuration=None):
    suppressions = Suppressions(Selection(configuration or Configuration()))
    outcome = plan_rewrites([root], suppressions)
    assert write_changes(outcome.changes).errors == ()
    return outcome, list(find_unused_comments(suppressions))


@pytest.mark.parametrize("entry", [GATE_UP, DOWN])
@pytest.mark.parametrize("above", [True, False])
def test_an_ignored_entry_stays_and_so_does_its_pair_and_every_copy(tmp_path, entry, above):
    comment = f"# migrator: ignore[{'MIG001' if entry == GATE_UP else 'MIG002'}]"
    line = next(line for line in PACKED.splitlines() if line.endswith(entry))
    mine = f"        {comment}\n{line}" if above else f"{line}  {comment}"
    family(tmp_path)
    owner = tmp_path / OWNER
    owner.write_text(owner.read_text().replace(line, mine))
    before = texts(tmp_path)
    outcome, unused = rewritten(tmp_path)
    assert outcome.changes == ()
    assert unused == []
    assert texts(tmp_path) == before


def test_a_comment_in_a_generated_copy_decides_nothing_and_is_told_so(tmp_path):
    family(tmp_path)
    copy = tmp_path / COPY
    copy.write_text(copy.read_text().replace(GATE_UP, GATE_UP + COMMENT))
    outcome, unused = rewritten(tmp_path)
    assert len(outcome.changes) == 2
    assert unused == [], "it is mended where it came from"
    assert [(found.path, found.line, found.finding.code) for found in outcome.findings] == [(copy, 4, "MIG901")]
    assert f"{tmp_path / OWNER} owns this entry" in outcome.findings[0].finding.message


def test_a_copy_that_is_ignored_by_its_path_is_told_that_its_owner_decides(tmp_path):
    family(tmp_path)
    silent = Configuration(tmp_path, per_path_ignores=(("heir/**", frozenset({"MIG001"})),))
    outcome, _ = rewritten(tmp_path, silent)
    assert len(outcome.changes) == 2
    assert [(found.path.name, found.finding.code) for found in outcome.findings] == [
        ("configuration_heir.py", "MIG901")
    ]
    assert OWNER in outcome.findings[0].finding.message


def test_a_comment_that_the_owner_has_too_is_no_finding(tmp_path):
    family(tmp_path, PACKED.replace(GATE_UP, GATE_UP + COMMENT))
    outcome, unused = rewritten(tmp_path)
    assert (outcome.changes, outcome.findings, unused) == ((), (), [])


@pytest.mark.parametrize(
    ("owner", "configuration"),
    [
        (MIGRATED, {"ignore": frozenset({"MIG002"})}),
        (MIGRATED, {"per_path_ignores": (("toy", frozenset({"MIG001"})),)}),
        (MIGRATED.replace('_colwise",', '_colwise",' + COMMENT), {}),
    ],
)
def test_a_lagging_copy_is_not_brought_along_where_its_owner_is_held(tmp_path, owner, configuration):
    family(tmp_path)
    (tmp_path / OWNER).write_text(owner)
    outcome, unused = rewritten(tmp_path, Configuration(tmp_path, **configuration))
    assert (outcome.changes, unused) == ((), [])


@pytest.mark.parametrize(
    "entry",
    [
        '# migrator: ignore[MIG001]\n            {key}:\n                "packed_colwise",',
        '{key}:  # migrator: ignore[MIG001]\n                "packed_colwise",',
        '{key}:\n                "packed_colwise",  # migrator: ignore[MIG001]',
        '{key}:\n                # migrator: ignore[MIG001]\n                "packed_colwise",',
    ],
)
def test_an_entry_on_two_lines_is_spoken_of_at_either(tmp_path, entry):
    before = '"layers.*.mlp.experts.gate_up_proj": "packed_colwise",'
    assert before in PACKED
    text = PACKED.replace(before, entry.format(key='"layers.*.mlp.experts.gate_up_proj"'))
    write_tree(tmp_path, {OWNER: text, "toy/modeling_toy.py": REGULAR})
    outcome, unused = rewritten(tmp_path)
    assert (outcome.changes, outcome.findings, unused) == ((), (), [])


SPLIT = """
class ToyConfig(PreTrainedConfig):
    base_model_tp_plan = {"layers.*.mlp.experts": "moe_tp_experts"}
    base_model_sp_plan = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }

    def __post_init__(self):
        self.base_model_tp_plan["layers.*.mlp.experts.gate_up_proj"] = "packed_colwise"
        self.base_model_tp_plan |= {"layers.*.mlp.experts.down_proj": "rowwise"}
"""


@pytest.mark.parametrize(
    "line",
    [
        'self.base_model_tp_plan["layers.*.mlp.experts.gate_up_proj"] = "packed_colwise"',
        'self.base_model_tp_plan |= {"layers.*.mlp.experts.down_proj": "rowwise"}',
    ],
)
def test_a_pair_in_two_statements_is_held_as_one_and_only_in_its_plan(tmp_path, line):
    comment = "  # migrator: ignore[MIG001, MIG002]"
    write_tree(tmp_path, {OWNER: SPLIT.replace(line, line + comment), "toy/modeling_toy.py": REGULAR})
    outcome, unused = rewritten(tmp_path)
    assert {edit.attribute for change in outcome.changes for edit in change.edits} == {"base_model_sp_plan"}
    assert len(unused) == 1, "each entry has one of the two"


def test_what_is_ignored_is_no_other_finding_instead(tmp_path):
    hook = '"layers.*.mlp.experts": "moe_experts_allreduce",  # migrator: ignore[MIG003]'
    write_tree(tmp_path, {OWNER: f"class ToyConfig:\n    base_model_tp_plan = {{\n        {hook}\n    }}\n"})
    write_tree(tmp_path, {"toy/modeling_toy.py": MODELING})
    suppressions = Suppressions()
    outcome = check_paths([tmp_path], suppressions, source="transformers-5.23")
    assert (outcome.changes, codes(outcome), list(find_unused_comments(suppressions))) == ((), [], [])


def test_the_other_modules_of_the_plan_are_still_rewritten(tmp_path):
    second = PACKED.replace("mlp.experts", "mlp.text_moe.experts").splitlines()[3:6]
    text = PACKED.replace(GATE_UP, GATE_UP + COMMENT, 1).replace("    }", "\n".join([*second, "    }"]))
    write_tree(tmp_path, {OWNER: text, "toy/modeling_toy.py": REGULAR})
    outcome, unused = rewritten(tmp_path)
    assert [edit.edit.key for edit in outcome.changes[0].edits] == [
        "layers.*.mlp.text_moe.experts.gate_up_proj",
        "layers.*.mlp.text_moe.experts.down_proj",
    ]
    assert unused == []


def test_a_silenced_finding_is_not_reported(tmp_path):
    write_tree(tmp_path, {OWNER: PACKED.replace(GATE_UP, GATE_UP + "  # migrator: ignore[MIG203]")})
    outcome, unused = rewritten(tmp_path)
    assert (outcome.findings, unused) == ((), [])


def test_an_unused_comment_is_located(tmp_path):
    family(tmp_path, PACKED.replace('"moe_tp_experts",', '"moe_tp_experts",  # migrator: ignore[MIG001]'))
    outcome, unused = rewritten(tmp_path)
    assert len(outcome.changes) == 2
    assert [(found.path.name, found.line, found.finding.code) for found in unused] == [
        ("configuration_toy.py", 5, "MIG901")
    ]


@pytest.mark.parametrize(
    "configuration",
    [
        {"ignore": frozenset({"MIG001"})},
        {"per_path_ignores": (("toy/*.py", frozenset({"MIG002"})),)},
        {"per_path_ignores": (("configuration_*.py", frozenset({"MIG002"})),)},
    ],
)
def test_the_configuration_ignores_codes_too(tmp_path, configuration):
    family(tmp_path)
    outcome, _ = rewritten(tmp_path, Configuration(tmp_path, **configuration))
    assert outcome.changes == ()


def test_an_excluded_copy_holds_back_its_family(tmp_path):
    family(tmp_path)
    outcome, _ = rewritten(tmp_path, Configuration(tmp_path, exclude=("heir",)))
    assert outcome.changes == ()
    assert [(found.path.name, found.finding.code) for found in outcome.findings] == [("configuration_toy.py", "MIG304")]
    assert "configuration_heir.py is excluded by 'heir'" in outcome.findings[0].finding.message


def test_an_excluded_owner_is_named_with_what_excludes_it(tmp_path):
    family(tmp_path)
    outcome, _ = rewritten(tmp_path, Configuration(tmp_path, exclude=("nothing", "toy/**")))
    assert outcome.changes == ()
    assert [(found.path.name, found.finding.code) for found in outcome.findings] == [
        ("configuration_heir.py", "MIG304")
    ]
    assert "configuration_toy.py is excluded by 'toy/**' in pyproject.toml" in outcome.findings[0].finding.message


def test_an_excluded_file_may_be_broken(tmp_path):
    write_tree(tmp_path, {"bad/configuration_bad.py": PACKED + "def broken(:\n"})
    outcome, _ = rewritten(tmp_path, Configuration(tmp_path, exclude=("bad/**",)))
    assert outcome.errors == ()


@given(st.binary(), st.binary())
def test_no_bytes_make_it_raise(before, after):
    for ignore in read_ignores(before + b"# migrator: ignore[MIG001]" + after):
        assert ignore.target_line >= ignore.line >= 1


@given(st.text(alphabet="xy =()[]{}:'\"#\\\r\n\t\0é,"))
def test_no_text_makes_it_raise(text):
    assert all(ignore.codes == ("MIG001",) for ignore in read_ignores((text + "\n# migrator: ignore[MIG001]").encode()))
