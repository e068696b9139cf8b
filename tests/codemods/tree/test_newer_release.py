"""Trees of a release that no dialect describes: read as the newest one, and held where their styles are new."""

from __future__ import annotations

import pytest

from codemods.checking.check import check_paths
from codemods.rewriting.migrate import plan_rewrites
from codemods.tree.detect import detect_tree_dialect
from plans.dialect import dialect_names, load_dialect
from tests.codemods.helpers import MIGRATED, PACKED, codes, generated, write_tree
from tests.codemods.tree.test_registry import mapping, registering
from tests.migrator.source_trees import MODELING, migrator

NEWEST = max(map(load_dialect, dialect_names()), key=lambda dialect: dialect.sort_key)
STYLES = sorted(NEWEST.styles)
NEW_STYLE = "colwise_twice"
USES_NEW_STYLE = PACKED.replace('"rowwise"', f'"{NEW_STYLE}"')
USES_IT_ELSEWHERE = PACKED.replace("    }\n", f'        "layers.*.self_attn.q_proj": "{NEW_STYLE}",\n    }}\n')
DENSE = f'class ToyConfig(PreTrainedConfig):\n    base_model_tp_plan = {{"layers.*.self_attn.q_proj": "{NEW_STYLE}"}}\n'
CONFIG = "src/transformers/models/toy/configuration_toy.py"
REGISTRY = "src/transformers/distributed/styles.py"


def tree(root, registry, version="99.1.0", plan=PACKED, others=None):
    """A release's tree with one model whose plan can be rewritten, and another one beside it."""
    files = {
        "models/toy/configuration_toy.py": plan,
        "models/toy/modeling_toy.py": MODELING,
        "models/known/configuration_known.py": PACKED.replace("Toy", "Known"),
        "models/known/modeling_known.py": MODELING.replace("Toy", "Known"),
        "distributed/styles.py": registry,
        "__init__.py": f'__version__ = "{version}"\n' if version else "",
        **(others or {}),
    }
    return write_tree(root, {f"src/transformers/{name}": text for name, text in files.items()})


@pytest.mark.parametrize("version", ["99.1.0", "99.0.0.dev0", "99.1.0rc1"])
@pytest.mark.parametrize("write", [mapping, registering])
def test_a_newer_release_without_new_styles_is_read_as_the_newest_with_a_note(tmp_path, write, version):
    root = tree(
        tmp_path,
        write(STYLES),
        version,
        MIGRATED,
        {"models/known/configuration_known.py": MIGRATED.replace("Toy", "Known")},
    )
    detected = detect_tree_dialect(root / "src/transformers", ()).detected
    assert detected.dialect == NEWEST.name
    assert f"says {version}, newer than every known dialect" in detected.reason
    checked = migrator("check", ".", cwd=root)
    assert checked.returncode == 0
    assert f"says {version}, newer than every known dialect".encode() in checked.stdout


def test_a_newer_release_without_new_styles_is_rewritten_with_a_note(tmp_path):
    root = tree(tmp_path, registering(STYLES))
    written = migrator("rewrite", ".", cwd=root)
    assert written.returncode == 0
    assert f"read as {NEWEST.name}: ".encode() in written.stdout
    assert b"newer than every known dialect" in written.stdout
    assert (root / CONFIG).read_text() == MIGRATED.lstrip()


def test_a_newer_release_without_a_registry_is_read_as_the_newest_with_a_note(tmp_path):
    reason = detect_tree_dialect(tree(tmp_path, ""), ()).detected.reason
    assert reason.endswith("(note: that is newer than every known dialect, and no registry of styles was found)")


@pytest.mark.parametrize("write", [mapping, registering])
@pytest.mark.parametrize("plan", [USES_NEW_STYLE, USES_IT_ELSEWHERE, DENSE])
def test_plans_with_a_new_style_are_held_and_the_rest_is_rewritten(tmp_path, plan, write):
    root = tree(tmp_path, write([*STYLES, NEW_STYLE]), plan=plan)
    before = (root / CONFIG).read_text()
    run = migrator("rewrite", ".", cwd=root)
    assert run.returncode == 2
    assert (root / CONFIG).read_text() == before
    assert (root / "src/transformers/models/known/configuration_known.py").read_text() == MIGRATED.replace(
        "Toy", "Known"
    ).lstrip()
    line = next(number for number, text in enumerate(before.splitlines(), 1) if NEW_STYLE in text)
    assert (
        f"{CONFIG}:{line} is not rewritten: transformers 99.1.0, newer than every known dialect".encode() in run.stderr
    )
    assert f"{NEW_STYLE} ({REGISTRY}:".encode() in run.stderr
    assert f"hint: set --source to the dialect of these plans: {NEWEST.name}".encode() in run.stderr
    assert run.stderr.count(NEW_STYLE.encode()) == 1


@pytest.mark.parametrize("write", [mapping, registering])
def test_check_reports_each_new_style_once_where_it_is_registered(tmp_path, write):
    new = [NEW_STYLE, "rowwise_twice"]
    root = tree(tmp_path, write([*STYLES, *new]), plan=USES_NEW_STYLE)
    outcome = check_paths([root])
    found = [each for each in outcome.findings if each.finding.code == "MIG509"]
    lines = (root / REGISTRY).read_text().splitlines()
    assert [(each.path, each.finding.key) for each in found] == [(root / REGISTRY, name) for name in new]
    assert all(each.finding.key in lines[each.line - 1] for each in found)
    assert "configuration_toy.py:4 is not rewritten" in found[0].finding.message
    assert "not rewritten" not in found[1].finding.message
    assert codes(outcome) == ["MIG509", "MIG509"]
    assert [change.path.parent.name for change in outcome.changes] == ["known"]
    assert migrator("check", ".", cwd=root).returncode == 1


def test_both_named_steps_work(tmp_path):
    own = f'extends = "{NEWEST.name}"\n[styles.{NEW_STYLE}]\njob = "both"\ndoes = "two"\n[styles.{NEW_STYLE}.means]\n'
    for name, source in (("known", NEWEST.name), ("file", "own.toml")):
        root = tree(tmp_path / name, registering([*STYLES, NEW_STYLE]), plan=USES_IT_ELSEWHERE)
        write_tree(root, {"own.toml": own})
        run = migrator("rewrite", "--source", source, ".", cwd=root)
        assert run.returncode == 0, run.stderr
        assert "moe_tp_gate_up_colwise" in (root / CONFIG).read_text()


def test_a_renamed_style_is_a_new_one(tmp_path):
    styles = [NEW_STYLE if name == "packed_colwise" else name for name in STYLES]
    outcome = plan_rewrites([tree(tmp_path, registering(styles), plan=PACKED.replace("packed_colwise", NEW_STYLE))])
    assert [change.path.parent.name for change in outcome.changes] == ["known"]
    assert [error.data["styles"] for error in outcome.errors] == [[NEW_STYLE]]


@pytest.mark.parametrize("dropped", [1, 5, 12])
def test_a_newer_release_that_drops_styles_is_read_as_the_newest(tmp_path, dropped):
    kept = [name for name in STYLES if name not in load_dialect("param-level").styles][: -dropped or None] or [
        "colwise"
    ]
    found = detect_tree_dialect(tree(tmp_path, registering(kept)) / "src/transformers", ())
    assert found.detected.dialect == NEWEST.name
    assert found.release is not None
    assert found.release.styles == {}
    assert kept[0] in found.vocabulary.styles
    assert set(kept) == found.vocabulary.styles.keys()


def test_a_name_that_only_older_dialects_have_is_new_again(tmp_path):
    assert "ep_router" not in NEWEST.styles
    found = detect_tree_dialect(tree(tmp_path, registering([*STYLES, "ep_router"])) / "src/transformers", ())
    assert found.detected.dialect == NEWEST.name
    assert found.release is not None
    assert list(found.release.styles) == ["ep_router"]


def test_styles_that_a_loop_registers_are_found_in_its_list(tmp_path):
    names = "".join(f'    "{name}",\n' for name in [*STYLES, NEW_STYLE])
    registry = registering([]).partition("\nif is_torch")[0]
    registry += f"\nNAMES = [\n{names}]\nfor name in NAMES:\n    ALL_PARALLEL_STYLES.register(name, Style())\n"
    root = tree(tmp_path, registry, plan=USES_NEW_STYLE)
    (found,) = (each for each in check_paths([root]).findings if each.finding.code == "MIG509")
    assert (root / REGISTRY).read_text().splitlines()[found.line - 1] == f'    "{NEW_STYLE}",'


def test_names_that_cannot_be_read_hold_the_plans_that_may_use_one(tmp_path):
    registry = registering(STYLES) + "\nfor name in load_names():\n    ALL_PARALLEL_STYLES.register(name, Style())\n"
    root = tree(tmp_path, registry, plan=USES_NEW_STYLE)
    outcome = plan_rewrites([root])
    assert [change.path.parent.name for change in outcome.changes] == ["known"]
    assert [error.data["styles"] for error in outcome.errors] == [[NEW_STYLE]]
    assert "MIG508" in codes(check_paths([root]))


def test_a_misspelled_style_of_a_newer_release_is_not_a_new_one(tmp_path):
    root = tree(tmp_path, registering(STYLES), plan=USES_IT_ELSEWHERE)
    assert plan_rewrites([root]).errors == ()
    assert codes(check_paths([root])) == ["MIG501"]


def test_without_a_version_a_style_that_no_dialect_has_is_new(tmp_path):
    root = tree(tmp_path, registering([*STYLES, NEW_STYLE]), version="", plan=USES_NEW_STYLE)
    (error,) = plan_rewrites([root]).errors
    assert "the tree, whose release is not known, has styles" in error.message
    assert codes(check_paths([root])) == ["MIG509"]


def test_a_fork_of_a_known_release_still_speaks_what_it_registers(tmp_path):
    version = f"{NEWEST.releases[-1]}.7"
    root = tree(tmp_path, registering([*STYLES, NEW_STYLE]), version, USES_IT_ELSEWHERE)
    assert codes(check_paths([root])) == []
    assert plan_rewrites([root]).errors == ()


def test_copies_of_a_held_plan_are_held(tmp_path):
    others = {
        "models/heir/modular_heir.py": "from ..toy.configuration_toy import ToyConfig\n\n\n"
        "class HeirConfig(ToyConfig):\n    pass\n",
        "models/heir/configuration_heir.py": generated("heir", USES_NEW_STYLE.replace("Toy", "Heir")),
        "models/heir/modeling_heir.py": MODELING.replace("Toy", "Heir"),
    }
    outcome = plan_rewrites([tree(tmp_path, registering([*STYLES, NEW_STYLE]), plan=USES_NEW_STYLE, others=others)])
    assert [change.path.parent.name for change in outcome.changes] == ["known"]
    assert len(outcome.errors[0].data["plans"]) == 2


def test_entries_that_code_adds_hold_the_plan_of_their_class(tmp_path):
    plan = PACKED + (
        "\n    def __post_init__(self, **kwargs):\n"
        f'        self.base_model_tp_plan["layers.*.self_attn.q_proj"] = "{NEW_STYLE}"\n'
    )
    outcome = plan_rewrites([tree(tmp_path, registering([*STYLES, NEW_STYLE]), plan=plan)])
    assert [change.path.parent.name for change in outcome.changes] == ["known"]
    assert len(outcome.errors) == 1


def test_a_finding_can_be_ignored_where_the_style_is_registered(tmp_path):
    registry = registering(STYLES) + (
        f'ALL_PARALLEL_STYLES.register("{NEW_STYLE}", Style())  # migrator: ignore[MIG509] described in own.toml\n'
    )
    assert codes(check_paths([tree(tmp_path, registry, plan=USES_NEW_STYLE)])) == []


NEW_PLAN = '    base_model_xp_plan = {"layers.*.mlp.experts": "moe_tp_experts"}\n'


@pytest.mark.parametrize(
    "added",
    [
        NEW_PLAN,
        NEW_PLAN.replace(" =", ": dict[str, str] | None ="),
        f"\n    def __post_init__(self, **kwargs):\n        self.{NEW_PLAN.strip()}\n",
    ],
)
@pytest.mark.parametrize("version", ["99.1.0", f"{NEWEST.releases[-1]}.0", ""])
def test_a_plan_attribute_that_no_release_has_is_reported_once_and_by_both_commands(tmp_path, added, version):
    others = {"models/known/configuration_known.py": PACKED.replace("Toy", "Known") + added}
    root = tree(tmp_path, registering(STYLES), version, PACKED + added, others)
    for outcome in (check_paths([root]), plan_rewrites([root])):
        (found,) = outcome.findings
        assert (found.finding.code, found.finding.key) == ("MIG510", "base_model_xp_plan")
        assert "base_model_xp_plan" in found.path.read_text().splitlines()[found.line - 1]
        assert len(outcome.changes) == 2


@pytest.mark.parametrize(
    "name", ["base_model_pp_plan", "base_model_fsdp_plan", "base_model_tp_ep_plan", "_training_plan"]
)
def test_other_plans_are_not_called_unknown(tmp_path, name):
    root = tree(tmp_path, registering(STYLES), plan=f"{PACKED}    {name} = {{}}\n    # base_model_xp_plan = {{}}\n")
    assert codes(check_paths([root])) == []


def test_the_installed_release_has_known_plan_attributes_only(installed_transformers):
    assert "MIG510" not in codes(plan_rewrites([installed_transformers]))
