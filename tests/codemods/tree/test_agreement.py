"""`rewrite` and `check` read a tree in the same way: the same errors, and the rest is still done."""

from __future__ import annotations

import pytest

from codemods.checking.check import check_paths
from codemods.rewriting.migrate import plan_rewrites
from tests.codemods.helpers import MIGRATED, PACKED, REGULAR, generated, write_tree
from tests.migrator.source_trees import migrator

DENSE = 'class ToyConfig:\n    base_model_tp_plan = {"q_proj": "colwise"}\n'
BUILT = 'class ToyConfig:\n    def __init__(self):\n        self.base_model_tp_plan = {"q_proj": "colwise"}\n'
TEMPLATE = "class {{cookiecutter.name}}Config:\n    base_model_tp_plan = {{plan}}\n"
BROKEN = "\n\ndef broken(:\n"

FILES = {
    "a template": {"templates/configuration_{{cookiecutter.name}}.py": TEMPLATE},
    "a template of experts": {"templates/configuration_x.py": TEMPLATE.replace("{{plan}}", '{{"mlp.experts": "x"}}')},
    "a dense plan that code builds": {"bad/configuration_bad.py": BUILT + BROKEN},
    "an expert plan": {"bad/configuration_bad.py": MIGRATED + BROKEN},
    "an expert plan that would change": {"bad/configuration_bad.py": PACKED + BROKEN, "bad/modeling_bad.py": REGULAR},
    "a script": {"scripts/convert.py": "plan = model.base_model_tp_plan\nprint 'x'\n"},
    "bytes": {"bad/configuration_bad.py": "# coding: latin-99\n" + BUILT},
    "a modular file without plans": {
        "bad/modular_bad.py": "from ..toy.configuration_toy import ToyConfig\nclass BadConfig(ToyConfig:\n    pass\n",
        "bad/configuration_bad.py": generated("bad", DENSE.replace("Toy", "Bad")),
    },
    "a modular file that lost its parent": {
        "bad/modular_bad.py": "from ..absent.configuration_absent import X\n\n\nclass BadConfig(X):\n    pass\n"
        + BROKEN,
        "bad/configuration_bad.py": generated("bad", DENSE.replace("Toy", "Bad")),
    },
}


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path, {"toy/configuration_toy.py": PACKED, "toy/modeling_toy.py": REGULAR})


@pytest.mark.parametrize("name", FILES)
def test_both_report_the_same_errors_and_go_on(tree, name):
    write_tree(tree, FILES[name])
    rewritten, checked = plan_rewrites([tree]), check_paths([tree])
    assert [error.message for error in rewritten.errors] == [error.message for error in checked.errors]
    assert len(rewritten.errors) == 1
    assert [change.path.name for change in checked.changes] == ["configuration_toy.py"]
    assert checked.changes == rewritten.changes


@pytest.mark.parametrize("name", ["a template", "a script"])
def test_both_commands_exit_with_2(tree, name):
    write_tree(tree, FILES[name])
    runs = [migrator(*command, cwd=tree) for command in (("check", "."), ("rewrite", "--check", "."), ("rewrite", "."))]
    assert [run.returncode for run in runs] == [2, 2, 2]
    assert len({run.stderr for run in runs}) == 1
    assert (tree / "toy/configuration_toy.py").read_text() == MIGRATED.lstrip()


FILLED_IN = {
    "a name in a key": ("layers.*.mlp.experts.{{ name }}", "rowwise"),
    "the beginning of a key": ("{{ prefix }}.mlp.experts.down_proj", "rowwise"),
    "another module": ("layers.*.self_attn.{% if x %}q{% else %}k{% endif %}", "colwise"),
    "a style": ("layers.*.mlp.experts.down_proj", "{{ cookiecutter.style }}"),
    "a key that is formatted": ("layers.*.mlp.experts.%(name)s", "rowwise"),
    "a key with a field": ("layers.*.mlp.experts.{name}", "rowwise"),
}


@pytest.mark.parametrize("form", ["{{{}}}", "{{**{{{}}}}}", "dict([({})])"])
@pytest.mark.parametrize("entry", FILLED_IN.values(), ids=FILLED_IN)
def test_text_that_something_else_fills_in_is_one_cause(tree, entry, form):
    """Half of a pair, a dead key, an unknown style: none of it is known before the template is filled in."""
    rows = [("layers.*.mlp.experts.gate_up_proj", "packed_colwise"), entry, ("layers.*.mlp.experts", "moe_tp_experts")]
    if form.startswith("dict"):
        value = f"dict([{', '.join(f'({key!r}, {style!r})' for key, style in rows)}])"
    else:
        value = form.format(", ".join(f"{key!r}: {style!r}" for key, style in rows))
    write_tree(tree, {"other/configuration_other.py": f"class OtherConfig:\n    base_model_tp_plan = {value}\n"})
    for outcome in (plan_rewrites([tree]), check_paths([tree])):
        (found,) = [found for found in outcome.findings if found.path.parent.name == "other"]
        assert (found.line, found.finding.code) == (2, "MIG204")
        filled_in = next(text for text in entry if set(text) & set("{%"))
        assert found.finding.message.endswith(f"something else fills in: {filled_in}")
        assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]


@pytest.mark.parametrize("value", ["{{ tp_plan }}", "{{ cookiecutter.tp_plan }}", "[[ tp_plan ]]", "'{{ tp_plan }}'"])
def test_both_name_a_template_that_parses(tree, value):
    write_tree(tree, {"other/configuration_other.py": f"class OtherConfig:\n    base_model_tp_plan = {value}\n"})
    for outcome in (plan_rewrites([tree]), check_paths([tree])):
        unread = [found for found in outcome.findings if found.path.parent.name == "other"]
        assert [(found.line, found.finding.code) for found in unread] == [(2, "MIG204")]
        assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]


def test_a_tree_that_is_too_old_stops_neither_command_from_the_rest(tree):
    files = {"__init__.py": '__version__ = "4.50.0"\n', "models/old/configuration_old.py": PACKED}
    files["models/old/modeling_old.py"] = REGULAR
    write_tree(tree, {f"old/transformers/{name}": text for name, text in files.items()})
    write_tree(tree, {"old/pyproject.toml": ""})
    runs = [
        migrator(*command, "toy", "old", cwd=tree) for command in (("check",), ("rewrite", "--check"), ("rewrite",))
    ]
    assert [run.returncode for run in runs] == [2, 2, 2]
    assert len({run.stderr for run in runs}) == 1
    assert b"4.50.0 is older than every known dialect" in runs[0].stderr
    assert b"MIG001" in runs[0].stdout
    assert (tree / "toy/configuration_toy.py").read_text() == MIGRATED.lstrip()
    assert (tree / "old/transformers/models/old/configuration_old.py").read_text() == PACKED.lstrip()


def test_what_needs_no_dialect_is_still_checked_in_a_tree_that_is_too_old(tree):
    twice = 'class OldConfig:\n    base_model_tp_plan = {"q_proj": "colwise", "q_proj": "klingon"}\n'
    files = {"__init__.py": '__version__ = "4.50.0"\n', "models/old/configuration_old.py": twice}
    write_tree(tree, {f"transformers/{name}": text for name, text in files.items()})
    outcome = check_paths([tree / "transformers"])
    assert [found.finding.code for found in outcome.findings] == ["MIG507"]
    assert len(outcome.errors) == 1
