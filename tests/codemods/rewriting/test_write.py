"""Changes written to disk: what could not be written is named, and what was written before it is reported."""

from __future__ import annotations

from codemods.rewriting import write
from codemods.rewriting.migrate import plan_rewrites
from plans.errors import SourceError
from tests.codemods.helpers import MIGRATED, PACKED, REGULAR, write_tree

HEADER = "# generated from toy/modular_toy.py\n# This file was automatically generated from toy/modular_toy.py.\n"


def test_an_owner_written_before_its_copy_failed_is_reported(tmp_path, monkeypatch):
    files = {
        "toy/modular_toy.py": PACKED,
        "toy/configuration_toy.py": HEADER + PACKED.lstrip("\n"),
        "toy/modeling_toy.py": REGULAR,
    }
    write_tree(tmp_path, files)
    replace = write.replace_source

    def fill_disk(source, data):
        if source.path.name.startswith("configuration_"):
            raise SourceError(f"{source.path}: no space left on device", hint="free some space")
        replace(source, data)

    changes = plan_rewrites([tmp_path]).changes
    assert [(change.path.name, change.role) for change in changes] == [
        ("modular_toy.py", "owner"),
        ("configuration_toy.py", "copy"),
    ]
    monkeypatch.setattr(write, "replace_source", fill_disk)
    result = write.write_changes(changes)
    assert [change.path.name for change in result.changes] == ["modular_toy.py"]
    assert [error.message for error in result.errors] == [
        f"{tmp_path / 'toy/configuration_toy.py'}: no space left on device"
    ]
    assert (tmp_path / "toy/modular_toy.py").read_text() == MIGRATED.lstrip("\n")

    monkeypatch.undo()
    again = write.write_changes(plan_rewrites([tmp_path]).changes)
    assert ([change.path.name for change in again.changes], again.errors) == (["configuration_toy.py"], ())


def test_files_of_other_plans_are_written_all_the_same(tmp_path, monkeypatch):
    write_tree(
        tmp_path,
        {
            "toy/configuration_toy.py": PACKED,
            "toy/modeling_toy.py": REGULAR,
            "other/configuration_other.py": PACKED.replace("Toy", "Other"),
            "other/modeling_other.py": REGULAR.replace("Toy", "Other"),
        },
    )
    replace = write.replace_source

    def fail_once(source, data):
        if source.path.name == "configuration_toy.py":
            raise SourceError("no space left on device", hint="free some space")
        replace(source, data)

    monkeypatch.setattr(write, "replace_source", fail_once)
    result = write.write_changes(plan_rewrites([tmp_path]).changes)
    assert [change.path.name for change in result.changes] == ["configuration_other.py"]
    assert [error.message for error in result.errors] == ["no space left on device"]
