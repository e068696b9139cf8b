"""Plans with their copies: rewritten together or not at all, over any depth."""

from __future__ import annotations

import pytest

from codemods.rewriting import migrate
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes
from plans.errors import SourceError
from tests.codemods.helpers import (
    MIGRATED,
    PACKED,
    REGULAR,
    chain,
    codes,
    generated,
    rewrite,
    write_tree,
)


def test_copies_follow_their_owner_over_any_depth(tmp_path):
    outcome = rewrite(chain(tmp_path))
    assert [(change.path.name, change.role) for change in outcome.changes] == [
        ("configuration_toy.py", "owner"),
        ("configuration_m0.py", "copy"),
        ("configuration_m1.py", "copy"),
        ("configuration_m2.py", "copy"),
    ]
    for name in ("m0", "m1", "m2"):
        assert "moe_tp_down_rowwise" in (tmp_path / name / f"configuration_{name}.py").read_text()


def test_a_modular_file_that_assigns_the_plan_owns_it(tmp_path):
    own = "    base_model_tp_plan = {\n" + "\n".join(PACKED.splitlines()[3:]) + "\n"
    outcome = rewrite(chain(tmp_path, depth=1, last=own))
    assert [(change.path.name, change.role) for change in outcome.changes] == [
        ("modular_m0.py", "owner"),
        ("configuration_toy.py", "owner"),
        ("configuration_m0.py", "copy"),
    ]


def test_one_irregular_descendant_holds_back_the_family(tmp_path):
    chain(tmp_path, depth=2)
    transposed = REGULAR.replace(
        "2 * self.intermediate_dim, self.hidden_dim", "self.hidden_dim, 2 * self.intermediate_dim"
    ).replace("self.hidden_dim, self.intermediate_dim))", "self.intermediate_dim, self.hidden_dim))")
    (tmp_path / "m1/modeling_m1.py").write_text(transposed)
    outcome = rewrite(tmp_path)
    assert outcome.changes == ()
    assert codes(outcome) == ["MIG101"]
    assert "modeling_m1.py:ToyExperts" in outcome.findings[0].finding.message


def test_a_copy_that_differs_from_its_owner_is_left_with_it(tmp_path):
    chain(tmp_path, depth=1)
    path = tmp_path / "m0/configuration_m0.py"
    path.write_text(path.read_text().replace("moe_tp_experts", "all_reduce"))
    outcome = rewrite(tmp_path)
    assert outcome.changes == ()
    assert codes(outcome) == ["MIG301"]


def test_a_copy_without_its_modular_file_is_left_alone(tmp_path):
    chain(tmp_path, depth=1)
    (tmp_path / "m0/modular_m0.py").unlink()
    outcome = rewrite(tmp_path)
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]
    assert codes(outcome) == ["MIG302"]


def test_a_cycle_is_found_and_does_not_hang(tmp_path):
    files = {}
    for name, other in (("a", "b"), ("b", "a")):
        files[f"{name}/modular_{name}.py"] = (
            f"from ..{other}.configuration_{other} import {other.upper()}Config\n"
            f"class {name.upper()}Config({other.upper()}Config):\n    pass\n"
        )
        files[f"{name}/configuration_{name}.py"] = generated(name, PACKED.replace("ToyConfig", f"{name.upper()}Config"))
    outcome = rewrite(write_tree(tmp_path, files))
    assert outcome.changes == ()
    assert codes(outcome) == ["MIG303", "MIG303"]


@pytest.mark.parametrize("given", ["toy", "toy/configuration_toy.py", "m1"])
def test_a_family_is_never_changed_in_part(tmp_path, given):
    chain(tmp_path)
    outcome = plan_rewrites([tmp_path / given])
    assert outcome.changes == ()
    assert set(codes(outcome)) == {"MIG304"}


def test_a_copy_that_only_lags_behind_is_brought_along(tmp_path):
    chain(tmp_path, depth=1)
    (tmp_path / "toy/configuration_toy.py").write_text(MIGRATED.lstrip())
    outcome = rewrite(tmp_path)
    assert [change.path.name for change in outcome.changes] == ["configuration_m0.py"]
    assert outcome.findings == ()


def test_a_generated_file_with_other_line_ends_is_still_one(tmp_path):
    chain(tmp_path, depth=1)
    path = tmp_path / "m0/configuration_m0.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "m0/modular_m0.py").unlink()
    assert codes(rewrite(tmp_path)) == ["MIG302"]


def test_a_family_with_a_file_that_cannot_be_written_is_left_whole(tmp_path):
    chain(tmp_path, depth=1)
    write_tree(tmp_path, {"b/configuration_b.py": PACKED.replace("Toy", "B"), "b/modeling_b.py": REGULAR})
    outcome = plan_rewrites([tmp_path])
    owner = tmp_path / "toy/configuration_toy.py"
    owner.write_text(owner.read_text() + "# mine\n")
    written = write_changes(outcome.changes)
    assert [change.path.name for change in written.changes] == ["configuration_b.py"]
    assert len(written.errors) == 2
    assert "packed_colwise" in (tmp_path / "m0/configuration_m0.py").read_text()


def test_a_rewrite_that_would_go_wrong_gives_up_its_family_only(tmp_path, monkeypatch):
    chain(tmp_path, depth=1)
    write_tree(tmp_path, {"b/configuration_b.py": PACKED.replace("Toy", "B"), "b/modeling_b.py": REGULAR})
    real = migrate.rewrite_source

    def fails_on_the_copy(source, module, edits):
        if source.path.name == "configuration_m0.py":
            raise SourceError("it went wrong", hint="report it")
        return real(source, module, edits)

    monkeypatch.setattr(migrate, "rewrite_source", fails_on_the_copy)
    outcome = plan_rewrites([tmp_path])
    assert [change.path.name for change in outcome.changes] == ["configuration_b.py"]
    assert [error.message for error in outcome.errors] == ["it went wrong"]
