"""The styles that a tree registers, read from its text, and the dialect that they show."""

from __future__ import annotations

from pathlib import Path

import pytest

from codemods.checking.check import check_paths
from codemods.files.sources import SourceFile
from codemods.rewriting.migrate import plan_rewrites
from codemods.tree.detect import detect_dialect, detect_tree_dialect
from codemods.tree.registry import read_registry
from plans.dialect import PARAM_LEVEL, dialect_names, load_dialect
from plans.errors import UsageError
from tests.codemods.helpers import codes, write_tree

FACTORY = "ALL_PARALLEL_STYLES: ParallelInterface = ParallelInterface()\n"
EMPTY = "class ParallelInterface(GeneralInterface):\n    _global_mapping = {}\n\n\n" + FACTORY
FORK, OF_FORK = "class Fork(ParallelInterface):\n", "\n\nALL_PARALLEL_STYLES = Fork()\n"
OWN = "ParallelInterface._global_mapping"


def mapping(names):
    """The registry of releases before 5.23: one class attribute."""
    entries = "".join(f'            "{name}": Style(),\n' for name in names)
    return (
        "class ParallelInterface(GeneralInterface):\n    _global_mapping = (\n        {\n"
        f"{entries}        }}\n        if is_torch_available()\n        else {{}}\n    )\n\n\n{FACTORY}"
    )


def registering(names):
    """The registry of releases since 5.23: calls."""
    calls = "".join(f'    ALL_PARALLEL_STYLES.register(\n        "{name}", Style()\n    )\n' for name in names)
    return f"{EMPTY}\nif is_torch_distributed_available():\n{calls}"


def read(*texts):
    return read_registry([SourceFile(Path(f"/{index}.py"), text.encode()) for index, text in enumerate(texts)])


def tree(root, registry, version=None, plan='"layers.*.q_proj": "colwise"', place="distributed/styles.py"):
    files = {
        place: registry,
        "models/toy/configuration_toy.py": f"class ToyConfig:\n    base_model_tp_plan = {{{plan}}}\n",
    }
    files["__init__.py"] = f'__version__ = "{version}"\n' if version else ""
    return write_tree(root, {f"src/transformers/{name}": text for name, text in files.items()}) / "src/transformers"


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        ([mapping(["a", "b"])], "a b"),
        ([registering(["a", "b"])], "a b"),
        (["ALL_PARALLEL_STYLES = {'a': A(), 'b': B()}\n"], "a b"),
        ([EMPTY + "ALL_PARALLEL_STYLES |= {'a': A()}\nALL_PARALLEL_STYLES._global_mapping |= {'b': B()}\n"], "a b"),
        ([EMPTY, "ParallelInterface._global_mapping |= {'a': A()}\n"], "a"),
        ([EMPTY, "ParallelInterface._global_mapping = {**{'a': A()}, 'b': B()}\n"], "a b"),
        ([mapping(["a"]).replace(FACTORY, FORK + "    pass\n" + OF_FORK)], "a"),
        ([mapping(["a"]).replace(FACTORY, FORK + f"    _global_mapping = {{**{OWN}, 'b': B()}}\n" + OF_FORK)], "a b"),
        ([mapping(["a"]).replace(FACTORY, FORK + f"    _global_mapping = {OWN} | {{'b': B()}}\n" + OF_FORK)], "a b"),
        (["ALL_PARALLEL_STYLES = dict(a=A(), **{'b': B()})\n"], "a b"),
        (["STYLES = {'a': A()}\nALL_PARALLEL_STYLES = Styles = STYLES | {'b': B()}\n"], "a b"),
        ([EMPTY, "from .x import ALL_PARALLEL_STYLES as STYLES\nSTYLES.register('a', A())\n"], "a"),
        ([EMPTY, "import x\nx.ALL_PARALLEL_STYLES['a'] = A()\n"], "a"),
        ([EMPTY, "ALL_PARALLEL_STYLES.update({'a': A()}, b=B())\n"], "a b"),
        ([EMPTY + "ParallelInterface.register('a', A())\n"], "a"),
        ([EMPTY + "ParallelInterface._global_mapping['a'] = A()\n"], "a"),
        (
            [
                EMPTY
                + "for name, style in {'a': A(), 'b': B()}.items():\n    ALL_PARALLEL_STYLES.register(name, style)\n"
            ],
            "a b",
        ),
        (
            [EMPTY + "for name, style in (('a', A()), ('b', B())):\n    ALL_PARALLEL_STYLES.register(name, style)\n"],
            "a b",
        ),
        ([EMPTY + "NAMES = ['a', 'b']\nfor name in NAMES:\n    ALL_PARALLEL_STYLES[name] = Style()\n"], "a b"),
        ([EMPTY + "def add(name):\n    ALL_PARALLEL_STYLES.register(name, A())\n\n\nadd('a')\nadd(name='b')\n"], "a b"),
        (
            [
                EMPTY + "def style(name):\n    def add(cls):\n        ALL_PARALLEL_STYLES.register(name, cls())\n"
                "        return cls\n    return add\n\n\n@style('a')\nclass A:\n    pass\n"
            ],
            "a",
        ),
        ([mapping(["a", "b"]) + "del ALL_PARALLEL_STYLES['b']\n"], "a"),
        ([mapping(["a", "b"]) + "ALL_PARALLEL_STYLES.pop('b', None)\n"], "a"),
    ],
)
def test_names_are_read_in_every_form(texts, names):
    registry = read(*texts)
    assert registry is not None
    assert registry.names == set(names.split())
    assert registry.unread == ()
    assert registry.where == Path("/0.py")


@pytest.mark.parametrize(
    "text",
    [
        "for name in find_names():\n    ALL_PARALLEL_STYLES.register(name, A())\n",
        "ALL_PARALLEL_STYLES.register(PREFIX + 'a', A())\n",
        "ALL_PARALLEL_STYLES.register(f'{x}_a', A())\n",
        "ALL_PARALLEL_STYLES.update(load_styles())\n",
        "def add(name):\n    ALL_PARALLEL_STYLES.register(name, A())\n",
        "ALL_PARALLEL_STYLES.register('a', A()\n",
    ],
)
def test_names_that_cannot_be_read_are_said(text):
    registry = read(EMPTY, text)
    assert registry is not None
    assert [place.rpartition(":")[0] for place in registry.unread] == ["/1.py"]


@pytest.mark.parametrize(
    "text", ["from .x import ALL_PARALLEL_STYLES\n", "if style not in ALL_PARALLEL_STYLES:\n    pass\n"]
)
def test_uses_of_a_registry_are_no_registrations(text):
    assert read(text) is None


@pytest.mark.parametrize("write", [mapping, registering])
@pytest.mark.parametrize("name", [name for name in dialect_names() if name != PARAM_LEVEL])
def test_a_registry_shows_its_dialect(tmp_path, name, write):
    styles = load_dialect(name).styles
    package = tree(tmp_path, write(styles))
    for root in (package, package / "models", package / "models/toy/configuration_toy.py"):
        found = detect_dialect(root, {"rowwise_rep", "gather"})
        assert load_dialect(found.dialect).styles.keys() == styles.keys()
    outcome = check_paths([tmp_path])
    assert outcome.dialect is not None
    assert load_dialect(outcome.dialect.dialect).styles.keys() == styles.keys()


@pytest.mark.parametrize(
    ("version", "registered", "dialect"),
    [
        ("5.24.0", "transformers-5.3", "transformers-5.3"),
        ("5.3.0.dev0", "transformers-5.3", "transformers-5.3"),
        ("5.9.0", "dtensor", "dtensor"),
        ("4.40.0", "transformers-5.23", "transformers-5.23"),
    ],
)
def test_a_registry_wins_over_the_version(tmp_path, version, registered, dialect):
    package = tree(tmp_path, mapping(load_dialect(registered).styles), version)
    found = detect_dialect(package, ())
    assert found.dialect == dialect
    assert f"note: {package / '__init__.py'} says {version}" in found.reason
    assert "the registry decides" in found.reason


def test_agreement_is_not_worth_a_note(tmp_path):
    found = detect_dialect(tree(tmp_path, mapping(load_dialect("transformers-5.16").styles), "5.17.1"), ())
    assert found.dialect == "transformers-5.16"
    assert "note" not in found.reason


def test_the_version_decides_between_dialects_of_the_same_names(tmp_path):
    same = [
        name
        for name in dialect_names()
        if load_dialect(name).styles.keys() == load_dialect("transformers-5.10").styles.keys()
    ]
    for name in same:
        for release in load_dialect(name).releases:
            package = tree(tmp_path / release, mapping(load_dialect(name).styles), f"{release}.0")
            assert detect_dialect(package, ()).dialect == name


def test_a_retired_name_is_an_error_of_its_own_line_only(tmp_path):
    plan = '"layers.*.q_proj": "colwise", "layers.*.o_proj": "rowwise_rep", "layers.*.k_proj": "colwise_gather_output"'
    tree(tmp_path, mapping(load_dialect("transformers-5.3").styles), "5.3.0.dev0", plan)
    outcome = check_paths([tmp_path])
    assert [(found.finding.code, found.finding.key) for found in outcome.findings] == [("MIG501", "layers.*.o_proj")]
    assert "transformers-5.3 has no style rowwise_rep" in outcome.findings[0].finding.message


@pytest.mark.parametrize(("style", "expected"), [("ours", []), ("theirs", ["MIG501"]), ("local_params", ["MIG501"])])
def test_a_fork_speaks_what_it_registers(tmp_path, style, expected):
    styles = [*load_dialect("transformers-5.23").styles, "ours"]
    styles.remove("local_params")
    tree(tmp_path, registering(styles), "5.23.0", f'"layers.*.q_proj": "{style}"')
    outcome = check_paths([tmp_path])
    assert codes(outcome) == expected
    assert outcome.dialect is not None
    assert outcome.dialect.dialect == "transformers-5.23"
    assert "also ours and not local_params" in outcome.dialect.reason


def test_a_plugin_adds_to_a_registry_that_lies_elsewhere(tmp_path):
    write_tree(
        tmp_path,
        {
            "plugin/styles.py": "ALL_PARALLEL_STYLES.register('ours', Ours())\n",
            "plugin/configuration_toy.py": 'class ToyConfig:\n    base_model_tp_plan = {"q": "ours", "k": "theirs"}\n',
            "tests/test_styles.py": "ALL_PARALLEL_STYLES.register('theirs', Ours())\n",
        },
    )
    assert [found.finding.key for found in check_paths([tmp_path]).findings] == ["k"]


def test_an_unknown_style_may_be_one_that_is_registered_under_an_unread_name(tmp_path):
    text = registering(load_dialect("transformers-5.23").styles)
    text += "\n\ndef add(name):\n    ALL_PARALLEL_STYLES.register(name, Style())\n"
    tree(tmp_path, text, "5.23.0", '"layers.*.q_proj": "ours", "layers.*.k_proj": "local_params"')
    outcome = check_paths([tmp_path])
    assert codes(outcome) == ["MIG508"]
    assert "styles.py:" in outcome.findings[0].finding.message


def test_a_style_of_unknown_meaning_may_shard(tmp_path):
    plan = '"layers.*.experts": "moe_tp_experts", "layers.*.experts.down_proj": "ours"'
    tree(tmp_path, registering([*load_dialect("transformers-5.23").styles, "ours"]), "5.23.0", plan)
    assert "MIG502" not in codes(check_paths([tmp_path]))


def test_without_registry_and_version_the_alternatives_are_said(tmp_path):
    found = detect_tree_dialect(tmp_path, {"sequence_parallel", "ep_router"})
    assert "no registry of styles and no version file" in found.detected.reason
    assert found.detected.alternatives
    assert found.detected.alternatives[0] in found.detected.reason


@pytest.mark.parametrize("registered", [None, "transformers-4.57"])
@pytest.mark.parametrize("version", ["4.47.0", "4.50.3", "4.56.2"])
def test_a_tree_that_is_too_old_is_refused_by_both_commands(tmp_path, version, registered):
    registry = mapping(load_dialect(registered).styles) if registered else ""
    tree(tmp_path, registry, version)
    outcomes = [run([tmp_path]) for run in (check_paths, plan_rewrites)]
    for outcome in outcomes:
        (error,) = outcome.errors
        assert isinstance(error, UsageError)
        assert f"{version} is older than every known dialect" in error.message
        assert outcome.changes == ()
    assert [run([tmp_path], source="transformers-4.57").errors for run in (check_paths, plan_rewrites)] == [(), ()]


@pytest.mark.parametrize("name", ["transformers-5.3", "transformers-5.16", "transformers-5.23"])
@pytest.mark.parametrize("registry", ["ALL_PARALLEL_STYLES = make_styles()\n", EMPTY + "load_styles()\n"])
def test_a_registry_that_cannot_be_read_leaves_the_choice_to_the_version(tmp_path, registry, name):
    version = f"{load_dialect(name).releases[0]}.0"
    found = detect_dialect(tree(tmp_path, registry, version), {"rowwise_rep"})
    assert found.dialect == name


def test_a_registry_that_is_read_in_part_has_the_names_of_the_version(tmp_path):
    text = "NAMES = find_names()\nALL_PARALLEL_STYLES = {'colwise': A(), 'rowwise': B(), **make_styles()}\n"
    for release in ("5.3.0", "5.16.0"):
        found = detect_dialect(tree(tmp_path / release, text, release), ())
        assert found.dialect == f"transformers-{release[:-2]}"


def test_a_registry_and_a_version_that_cannot_be_read_are_said(tmp_path):
    package = tree(tmp_path, "ALL_PARALLEL_STYLES = make_styles()\n")
    (package / "__init__.py").write_text("__version__ = find_version()\n")
    found = detect_dialect(package, {"sequence_parallel", "ep_router"})
    assert "the registry of styles cannot be read" in found.reason
    assert f"{package / '__init__.py'} gives no version that can be read" in found.reason
    assert found.alternatives
