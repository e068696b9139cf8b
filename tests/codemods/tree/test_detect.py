"""The dialect of a tree, detected from its version file or from its styles."""

from __future__ import annotations

import pytest

from codemods.tree.detect import detect_dialect
from plans.dialect import PARAM_LEVEL, dialect_names, load_dialect
from plans.errors import UsageError
from tests.codemods.helpers import write_tree


def tree(root, version):
    package = {"__init__.py": f'__version__ = "{version}"\n', "models/a/x.py": ""}
    return write_tree(root, {f"src/transformers/{name}": text for name, text in package.items()})


@pytest.mark.parametrize(
    "below", ["", "src", "src/transformers", "src/transformers/models", "src/transformers/models/a/x.py"]
)
def test_the_version_file_says(tmp_path, below):
    found = detect_dialect(tree(tmp_path, "5.17.0.dev0") / below, {"colwise", "ep_router"})
    assert found.dialect == "transformers-5.16"
    assert "5.17.0.dev0" in found.reason
    assert found.alternatives == ()


def test_the_installed_tree_speaks_its_release(installed_transformers):
    assert detect_dialect(installed_transformers / "models", {"colwise"}).dialect == "transformers-5.23"


@pytest.mark.parametrize("styles", [{"colwise", "vocab_allreduce", "module_allgather"}, {"rowwise_rep"}, {"gather"}])
def test_styles_that_a_release_lacks_do_not_change_its_dialect(tmp_path, styles):
    found = detect_dialect(tree(tmp_path, "5.3.0") / "src/transformers/models", {"colwise", *styles})
    assert found.dialect == "transformers-5.3"
    assert found.reason.endswith("says 5.3.0")


@pytest.mark.parametrize(
    ("version", "dialect"),
    [
        ("5.3.0.dev0", "transformers-4.57"),
        ("5.3.dev0", "transformers-4.57"),
        ("5.3.1.dev0", "transformers-5.3"),
        ("5.3.0rc1", "transformers-5.3"),
        ("5.23.0.dev0", "transformers-5.21"),
        ("5.24.0.dev0", "transformers-5.23"),
        ("6.0.0.dev0", "transformers-5.23"),
    ],
)
def test_a_development_version_is_before_its_release(tmp_path, version, dialect):
    assert detect_dialect(tree(tmp_path, version), ()).dialect == dialect


def test_a_style_that_no_dialect_knows_belies_nothing(tmp_path):
    found = detect_dialect(tree(tmp_path, "5.3.0"), {"colwise", "colwize"})
    assert (found.dialect, found.alternatives) == ("transformers-5.3", ())


def test_param_level_names_fit_everywhere(tmp_path):
    overlay = set(load_dialect(PARAM_LEVEL).styles)
    assert detect_dialect(tree(tmp_path, "5.9.0"), {"colwise", *overlay}).dialect == "transformers-5.6"
    assert detect_dialect(tmp_path / "elsewhere", {"colwise_rep", "gather", *overlay}).dialect == "transformers-4.57"


def test_a_tree_older_than_every_dialect_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"__init__\.py: .*4\.40"):
        detect_dialect(tree(tmp_path, "4.40.0"), {"colwise"})


@pytest.mark.parametrize(
    ("styles", "dialect"),
    [
        ({"colwise_rep", "local_rowwise", "gather"}, "transformers-4.57"),
        ({"ep_router", "packed_colwise", "moe_tp_experts"}, "transformers-5.21"),
        ({"ep_dispatch_experts", "ep_router"}, "transformers-5.21"),
        ({"colwise", "rowwise"}, "transformers-5.23"),
        ({"moe_gate_up_colwise"}, "dtensor-intermediate"),
        ({"activation", "rowwise_allreduce"}, "dtensor"),
        (set(), "transformers-5.23"),
    ],
)
def test_without_a_version_file_the_newest_that_holds_all_styles(tmp_path, styles, dialect):
    found = detect_dialect(tmp_path, styles)
    assert found.dialect == dialect
    assert dialect in found.reason
    assert "no version file" in found.reason
    assert all(styles <= load_dialect(name).styles.keys() for name in found.alternatives)
    assert dialect not in found.alternatives


def test_what_is_ambiguous_says_so(tmp_path):
    found = detect_dialect(tmp_path, {"sequence_parallel", "ep_router"})
    assert found.dialect == "transformers-5.21"
    assert found.alternatives[-1] == "transformers-4.57"
    assert "transformers-5.3" in found.reason
    assert "would fit too" in found.reason
    assert "transformers-5.19" not in found.alternatives, "there both mean the same"


def test_styles_of_two_dialects_say_what_is_lacking(tmp_path):
    found = detect_dialect(tmp_path, {"gather", "packed_colwise", "mla_kv_a_proj"})
    assert found.dialect == "transformers-5.23"
    assert "except gather" in found.reason


@pytest.mark.parametrize("name", [name for name in dialect_names() if name != PARAM_LEVEL])
def test_a_whole_vocabulary_is_recognised(tmp_path, name):
    styles = load_dialect(name).styles.keys()
    found = detect_dialect(tmp_path, styles)
    assert styles - load_dialect(PARAM_LEVEL).styles.keys() <= load_dialect(found.dialect).styles.keys()
    if name == "transformers-5.19":
        assert found.dialect == "transformers-5.21", "which only added names"


VERSION_FORMS = {
    "a local part": ('__version__ = "5.17.0.dev1+gabc"\n', "transformers-5.16"),
    "two names": ('version = __version__ = "5.3.0"\n', "transformers-5.3"),
    "an annotation": ('__version__: "str" = "5.3.0"\n', "transformers-5.3"),
    "a sum": ('__version__ = "5.3.0" + ".dev0"\n', "transformers-4.57"),
    "parts": ('MINOR = "5.3"\n__version__ = f"{MINOR}.1"\n', "transformers-5.3"),
    "another file": ("from ._version import version as __version__\n", "transformers-5.6"),
    "a shim": (
        'try:\n    from ._version import version as __version__\nexcept ImportError:\n    __version__ = "unknown"\n',
        "transformers-5.6",
    ),
    "a docstring": ('"""\n__version__ = "4.57.6"\n"""\n__version__ = "5.3.0"\n', "transformers-5.3"),
    "a file that does not parse": ('__version__ = "5.3.0"\ndef (\n', "transformers-5.3"),
}
NO_VERSIONS = {
    "installed": 'from importlib.metadata import version\n__version__ = version("transformers")\n',
    "computed": '__version__ = ".".join(map(str, (5, 3, 0)))\n',
    "two arms": 'if NEW:\n    __version__ = "5.24.0"\nelse:\n    __version__ = "5.3.0"\n',
    "an absent file": "from ._built import __version__\n",
    "itself": "from . import x\nfrom .__init__ import __version__\n",
}


@pytest.mark.parametrize(("text", "dialect"), VERSION_FORMS.values(), ids=VERSION_FORMS)
def test_a_version_is_read_in_every_form_that_shows_it(tmp_path, text, dialect):
    write_tree(tmp_path, {"src/transformers/_version.py": 'version = "5.6.2"\n'})
    (tmp_path / "src/transformers/__init__.py").write_text(text)
    assert detect_dialect(tmp_path, ()).dialect == dialect


@pytest.mark.parametrize("text", NO_VERSIONS.values(), ids=NO_VERSIONS)
def test_a_version_that_its_text_does_not_show_is_said(tmp_path, text):
    write_tree(tmp_path, {"src/transformers/__init__.py": text})
    reason = detect_dialect(tmp_path, ()).reason
    assert f"{tmp_path / 'src/transformers/__init__.py'} gives no version that can be read" in reason
