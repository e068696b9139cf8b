"""Experts found through names: what is imported is followed inside the tree, and unknown outside of it."""

from __future__ import annotations

from textwrap import indent

import pytest

from codemods.checking.check import check_paths
from codemods.models.experts import read_experts
from plans.model_facts import ExpertLayout, UnreadLayout
from tests.codemods.helpers import MIGRATED, PACKED, REGULAR, check_transformed, codes, rewrite, write_tree

KEY = "layers.*.mlp.experts"
TRANSPOSED = REGULAR.replace("2 * self.intermediate_dim, self.hidden_dim", "self.hidden_dim, 2 * self.width").replace(
    "self.hidden_dim, self.intermediate_dim", "self.width, self.hidden_dim"
)
FAST = TRANSPOSED.replace("ToyExperts", "FastExperts")
SAME = REGULAR.replace("ToyExperts", "FastExperts")
MODEL = """

class ToyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        {made}


class ToyLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mlp = ToyBlock(config)


class ToyModel(PreTrainedModel):
    config: ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([ToyLayer(config) for _ in range(2)])
"""
HEAD = "import torch\nfrom torch import nn\nfrom ...modeling_utils import PreTrainedModel\n"


def model(*made, imports="", experts=REGULAR):
    """A modeling file whose block makes its experts by these lines."""
    return HEAD + imports + experts + MODEL.format(made="\n        ".join(made))


def read(root, files, key=KEY):
    """The layout of the experts of `toy`, among files that are written below a folder of models."""
    write_tree(root, {f"pkg/models/{name}": text for name, text in files.items()})
    return read_experts(root / "pkg/models/toy", key, "ToyConfig")


def check_held(root, files, *words):
    """The plan of `toy` stays as it is with one finding, which says these words."""
    write_tree(root, {f"pkg/models/{name}": text for name, text in files.items()})
    write_tree(root, {"pkg/models/toy/configuration_toy.py": PACKED})
    outcome = rewrite(root)
    assert outcome.changes == ()
    (found,) = outcome.findings
    assert found.finding.code == "MIG203"
    for word in words:
        assert word in found.finding.message, found.finding.message
    assert [one.finding for one in check_paths([root]).findings if one.finding.code == "MIG203"] == [found.finding]


ONE_OF_TWO = {
    "both arms": ["self.experts = FastExperts(config) if config.fast else ToyExperts(config)"],
    "two branches": [
        "if config.fast:",
        "    self.experts = FastExperts(config)",
        "else:",
        "    self.experts = ToyExperts(config)",
    ],
    "a class in a name": ["kind = FastExperts if config.fast else ToyExperts", "self.experts = kind(config)"],
    "a name in two steps": [
        "kind = ToyExperts",
        "if config.fast:",
        "    kind = FastExperts",
        "self.experts = kind(config)",
    ],
    "a table": ["self.experts = {'a': ToyExperts, 'b': FastExperts}[config.kind](config)"],
    "an attribute": [
        "self.kind = ToyExperts",
        "if config.fast:",
        "    self.kind = FastExperts",
        "self.experts = self.kind(config)",
    ],
    "either": ["self.experts = config.fast and FastExperts(config) or ToyExperts(config)"],
    "registered": [
        "self.experts = ToyExperts(config)",
        "if config.fast:",
        '    self.add_module("experts", FastExperts(config))',
    ],
}


@pytest.mark.parametrize("made", ONE_OF_TWO.values(), ids=ONE_OF_TWO)
def test_every_class_that_may_be_made_counts(tmp_path, made):
    files = {"toy/modeling_toy.py": model(*made, imports="from .fast import FastExperts\n"), "toy/fast.py": FAST}
    assert isinstance(read(tmp_path / "differ", files), UnreadLayout)
    assert read(tmp_path / "same", files | {"toy/fast.py": SAME}).irregularity is None
    check_held(tmp_path / "held", files, "FastExperts or modeling_toy.py:ToyExperts, whose layouts differ")


@pytest.mark.parametrize("made", ONE_OF_TWO.values(), ids=ONE_OF_TWO)
def test_one_of_them_from_outside_the_tree_is_unknown(tmp_path, made):
    files = {"toy/modeling_toy.py": model(*made, imports="from fast_moe import FastExperts\n")}
    check_held(tmp_path, files, "modeling_toy.py:", "`FastExperts`, which comes from `fast_moe`")


SHARED = "from .moe import *\nfrom .other import *\n"
WAYS = {
    "beside it": ("from .moe import ToyExperts\n", {"toy/moe.py": "{}"}),
    "under another name": ("from .moe import Experts as ToyExperts\n", {"toy/moe.py": "{}\nExperts = ToyExperts\n"}),
    "everything": ("from .moe import *\n", {"toy/moe.py": "{}"}),
    "a package": ("from .layers import ToyExperts\n", {"toy/layers/__init__.py": "{}"}),
    "re-exported": (
        "from .layers import ToyExperts\n",
        {"toy/layers/__init__.py": "from .moe import ToyExperts\n", "toy/layers/moe.py": "{}"},
    ),
    "re-exported with everything": (
        "from ..shared import ToyExperts\n",
        {
            "shared/__init__.py": "from .moe import *\nfrom .other import *\n",
            "shared/moe.py": "{}",
            "shared/other.py": "",
        },
    ),
    "of another model": (
        "from ..base.modeling_base import ToyExperts\n",
        {"base/modeling_base.py": "{}"},
    ),
    "absolute": ("from pkg.models.base.moe import ToyExperts\n", {"base/moe.py": "{}"}),
    "inside a function": ("", {"toy/moe.py": "{}"}),
    "a shim with the same": (
        "try:\n    from .moe import ToyExperts\nexcept ImportError:\n    from .plain import ToyExperts\n",
        {"toy/moe.py": "{}", "toy/plain.py": REGULAR},
    ),
}


@pytest.mark.parametrize(("imports", "files"), WAYS.values(), ids=WAYS)
def test_an_imported_class_is_followed_inside_the_tree(tmp_path, imports, files):
    made = ["self.experts = ToyExperts(config)"]
    made = made if imports else ["from .moe import ToyExperts", *made]
    source = {"toy/modeling_toy.py": model(*made, imports=imports, experts="")}
    regular = read(tmp_path / "regular", source | {name: text.replace("{}", REGULAR) for name, text in files.items()})
    assert isinstance(regular, ExpertLayout), regular
    assert regular.irregularity is None
    for name, text in files.items():
        if "{}" in text:
            odd = read(tmp_path / "odd", source | files | {name: text.replace("{}", TRANSPOSED)})
            expected = UnreadLayout if "plain" in str(files) else ExpertLayout
            assert isinstance(odd, expected), odd
            assert isinstance(odd, UnreadLayout) or odd.irregularity == "MIG101"


@pytest.mark.parametrize(("fast", "code"), [(REGULAR, None), (TRANSPOSED, "MIG203")])
def test_classes_in_branches_of_a_file_count(tmp_path, fast, code):
    moe = "try:\n    import fused\n" + indent(fast, "    ") + "\nexcept ImportError:\n" + indent(REGULAR, "    ")
    source = model("self.experts = ToyExperts(config)", imports="from .moe import ToyExperts\n", experts="")
    for name, files in {"imported": {"modeling_toy": source, "moe": moe}, "own": {"modeling_toy": moe}}.items():
        found = read(tmp_path / name, {f"toy/{file}.py": text for file, text in files.items()})
        assert isinstance(found, UnreadLayout) == (code is not None), found


def test_a_module_is_followed_by_its_attribute(tmp_path):
    for imports, made in (
        ("from . import moe\n", "self.experts = moe.ToyExperts(config)"),
        ("import pkg.models.toy.moe as fast\n", "self.experts = fast.ToyExperts(config)"),
    ):
        files = {"toy/modeling_toy.py": model(made, imports=imports, experts=""), "toy/moe.py": TRANSPOSED}
        found = read(tmp_path, files)
        assert isinstance(found, ExpertLayout)
        assert found.irregularity == "MIG101"


OUTSIDE = {
    "a shim that leaves the tree": (
        "try:\n    from fast_moe import ToyExperts\nexcept ImportError:\n    from .moe import ToyExperts\n",
        "comes from `fast_moe`",
    ),
    "everything from outside": ("from fast_moe import *\n", "comes from `fast_moe`"),
    "a name that a module lacks": ("from .moe import Missing as ToyExperts\n", "is not in moe.py"),
    "a function": ("from .make import ToyExperts\n", "is made by code in make.py:1"),
    "nothing": ("", "is defined nowhere in the tree"),
    "a released model": (
        "from transformers.models.mixtral.modeling_mixtral import ToyExperts\n",
        "transformers.models",
    ),
    "another package of a circle": ("from .circle import ToyExperts\n", "`ToyExperts`"),
}


@pytest.mark.parametrize(("imports", "why"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_leaves_the_tree_is_unknown(tmp_path, imports, why):
    files = {
        "toy/modeling_toy.py": model("self.experts = ToyExperts(config)", imports=imports, experts=""),
        "toy/moe.py": REGULAR,
        "toy/make.py": "\ndef ToyExperts(config):\n    return build(config)\n",
        "toy/circle.py": "from .round import ToyExperts\n",
        "toy/round.py": "from .circle import ToyExperts\n",
    }
    check_held(tmp_path, files, "modeling_toy.py:", why)


HIDDEN = {
    "a tuple": ["self.experts, self.gate = ToyExperts(config), nn.Linear(1, 2)"],
    "on one line": ["self.experts = ToyExperts(config)", "if config.fast: self.experts = FastExperts(config)"],
    "by name": ["self.experts = ToyExperts(config)", 'setattr(self, "experts", FastExperts(config))'],
    "by a computed name": ["self.experts = ToyExperts(config)", "setattr(self, name, FastExperts(config))"],
    "among the modules": ["self.experts = ToyExperts(config)", 'self._modules["experts"] = FastExperts(config)'],
    "of another object": ["self.experts = ToyExperts(config)", "config.layer.mlp.experts = FastExperts(config)"],
    "the module above": ["self.experts = ToyExperts(config)", "config.layer.mlp = FastBlock(config)"],
    "more layers": ["self.experts = ToyExperts(config)", "self.layers += [FastLayer(config)]"],
    "its forward": ["self.experts = ToyExperts(config)", "self.experts.forward = fast_forward"],
    "in a loop": ["for self.experts in (ToyExperts(config), FastExperts(config)):", "    pass"],
    "a loop's name": ["for kind in (FastExperts, ToyExperts):", "    self.experts = kind(config)"],
    "an unknown class of two": [
        "kind = ToyExperts",
        "if config.fast:",
        "    kind, size = FastExperts, 2",
        "self.experts = kind(config)",
    ],
    "a parameter": ["self.experts = experts_class(config)"],
    "a lookup": ["self.experts = getattr(kernels, config.kind)(config)"],
    "handed in": ["self.experts = config.experts"],
}


@pytest.mark.parametrize("made", HIDDEN.values(), ids=HIDDEN)
def test_an_assignment_that_is_not_read_is_named(tmp_path, made):
    check_held(tmp_path, {"toy/modeling_toy.py": model(*made)}, "modeling_toy.py:")
    assert codes(check_paths([tmp_path])) == ["MIG203"]


BASES = {
    "imported": ("from .moe import BaseExperts\n", {"toy/moe.py": "{}"}),
    "of another model": (
        "from ..base.modeling_base import BaseExperts\n",
        {"base/modeling_base.py": "{}"},
    ),
    "through a package": (
        "from ..shared import BaseExperts\n",
        {"shared/__init__.py": "from .moe import BaseExperts\n", "shared/moe.py": "{}"},
    ),
}


@pytest.mark.parametrize(("imports", "files"), BASES.values(), ids=BASES)
def test_an_imported_base_is_read(tmp_path, imports, files):
    heir = "\n\nclass ToyExperts(BaseExperts):\n    pass\n"
    source = {"toy/modeling_toy.py": model("self.experts = ToyExperts(config)", imports=imports, experts=heir)}
    for text, code in ((REGULAR, None), (TRANSPOSED, "MIG101")):
        base = {name: one.replace("{}", text.replace("ToyExperts", "BaseExperts")) for name, one in files.items()}
        found = read(tmp_path / str(code), source | base)
        assert isinstance(found, ExpertLayout), found
        assert (found.where, found.irregularity) == ("modeling_toy.py:ToyExperts", code)


@pytest.mark.parametrize(
    ("imports", "bases"),
    [
        ("from fast_moe import FastMixin\n", "FastMixin, ToyBase"),
        ("from transformers.models.mixtral.modeling_mixtral import MixtralExperts\n", "MixtralExperts"),
        ("from .missing import Base\n", "Base, ToyBase"),
        ("from ...kernels import KernelMixin\n", "KernelMixin, ToyBase"),
        ("try:\n    from fast_moe import ToyBase\nexcept ImportError:\n    pass\n", "ToyBase"),
    ],
)
def test_a_base_from_outside_is_unknown(tmp_path, imports, bases):
    experts = REGULAR.replace("ToyExperts", "ToyBase") + f"\n\nclass ToyExperts({bases}):\n    pass\n"
    if "MixtralExperts" in bases:
        experts += REGULAR.partition("nn.Module):\n")[2]
    source = model("self.experts = ToyExperts(config)", imports=imports, experts=experts)
    check_held(tmp_path, {"toy/modeling_toy.py": source}, "modeling_toy.py:ToyExperts: its base `")


@pytest.mark.parametrize(
    ("imports", "held"),
    [
        ("from ...integrations import use_experts_implementation\n", False),
        ("from transformers.integrations.moe import use_experts_implementation\n", False),
        ("from .compat import use_experts_implementation\n", True),
        ("from fast_moe import use_experts_implementation\n", True),
    ],
)
def test_a_decorator_is_known_by_where_it_comes_from(tmp_path, imports, held):
    source = {"toy/modeling_toy.py": model("self.experts = ToyExperts(config)", imports=imports)}
    if held:
        source["toy/compat.py"] = "def use_experts_implementation(cls):\n    return replace(cls)\n"
        check_held(tmp_path, source, "decorates ToyExperts with `use_experts_implementation`")
    else:
        assert isinstance(read(tmp_path, source), ExpertLayout)


def test_a_decorator_of_the_class_that_makes_them_counts(tmp_path):
    source = model("self.experts = ToyExperts(config)").replace("class ToyBlock", "@fused\nclass ToyBlock")
    check_held(tmp_path, {"toy/modeling_toy.py": source}, "decorates ToyBlock with `fused`")


DEAD = """
class ToyConfig(PreTrainedConfig):
    base_model_tp_plan = {
        "layers.*.mlp.experts.*.gate_proj": "colwise",
        "layers.*.mlp.experts.*.up_proj": "colwise",
        "layers.*.mlp.experts.*.down_proj": "rowwise",
    }
"""


@pytest.mark.parametrize(("imports", "files"), WAYS.values(), ids=WAYS)
def test_keys_of_single_experts_of_an_imported_class_are_impossible(tmp_path, imports, files):
    made = ["self.experts = ToyExperts(config)"]
    made = made if imports else ["from .moe import ToyExperts", *made]
    source = {"toy/modeling_toy.py": model(*made, imports=imports, experts=""), "toy/configuration_toy.py": DEAD}
    source |= {name: text.replace("{}", REGULAR) for name, text in files.items()}
    write_tree(tmp_path, {f"pkg/models/{name}": text for name, text in source.items()})
    assert codes(check_paths([tmp_path])) == ["MIG506"] * 3


@pytest.mark.parametrize("imports", [imports for imports, _ in OUTSIDE.values()], ids=OUTSIDE)
def test_keys_below_an_unknown_class_may_exist(tmp_path, imports):
    source = {"toy/modeling_toy.py": model("self.experts = ToyExperts(config)", imports=imports, experts="")}
    write_tree(tmp_path, {f"pkg/models/{name}": text for name, text in source.items()})
    write_tree(tmp_path, {"pkg/models/toy/configuration_toy.py": DEAD})
    assert codes(check_paths([tmp_path])) == []


def test_a_followed_file_that_changes_is_read_again(tmp_path):
    source = model("self.experts = ToyExperts(config)", imports="from .moe import ToyExperts\n", experts="")
    assert read(tmp_path, {"toy/modeling_toy.py": source, "toy/moe.py": TRANSPOSED}).irregularity == "MIG101"
    assert read(tmp_path, {"toy/moe.py": REGULAR}).irregularity is None


def test_experts_in_the_plans_own_file_are_read(tmp_path):
    write_tree(tmp_path, {"toy/toy.py": PACKED + REGULAR})
    outcome = rewrite(tmp_path)
    assert (tmp_path / "toy/toy.py").read_text() == (MIGRATED + REGULAR).lstrip("\n")
    assert outcome.findings == ()
    write_tree(tmp_path, {"odd/configuration_odd.py": PACKED + TRANSPOSED})
    assert codes(rewrite(tmp_path / "odd")) == ["MIG101"]


def test_experts_in_a_file_beside_the_plans_own_are_read(tmp_path):
    source = model("self.experts = ToyExperts(config)", imports="from .layers import ToyExperts\n", experts="")
    write_tree(tmp_path, {"toy/toy.py": source + PACKED, "toy/layers.py": REGULAR})
    assert rewrite(tmp_path).findings == ()
    assert "moe_tp_gate_up_colwise" in (tmp_path / "toy/toy.py").read_text()


def test_a_plan_is_rewritten_by_an_imported_class(tmp_path):
    write_tree(tmp_path, {"toy/layers/moe.py": REGULAR, "toy/layers/__init__.py": "from .moe import ToyExperts\n"})
    source = model("self.experts = ToyExperts(config)", imports="from .layers import ToyExperts\n", experts="")
    check_transformed(tmp_path, PACKED, MIGRATED, source)


HALVED = "gate, up = nn.functional.linear(hidden_states, self.gate_up_proj[0]).chunk(2, dim=-1)"
CAUSES = {
    "no source": ({}, "no modeling file is beside it"),
    "a list": (
        {"toy/modeling_toy.py": model("self.experts = nn.ModuleList([nn.Linear(1, 2)])")},
        "makes a list of modules of it",
    ),
    "no stacked parameter": (
        {"toy/modeling_toy.py": model("self.experts = ToyBlock(config)")},
        "ToyBlock stacks no experts",
    ),
    "unreadable dims": (
        {"toy/modeling_toy.py": REGULAR.replace("2 * self.intermediate_dim", "self.width")},
        "gives `gate_up_proj` the dims [self.num_experts, self.width, self.hidden_dim]",
    ),
    "another parameter": (
        {
            "toy/modeling_toy.py": REGULAR.replace(
                "        self.down_proj =", "        self.scale = nn.Parameter(torch.ones(1))\n        self.down_proj ="
            )
        },
        "has another parameter, `scale`",
    ),
    "another order": (
        {"toy/modeling_toy.py": REGULAR.replace("nn.functional.linear(hidden_states", "swiglu(hidden_states")},
        "modeling_toy.py:9 uses `gate_up_proj`",
    ),
    "no order": (
        {
            "toy/modeling_toy.py": REGULAR.replace(
                "gate, up = nn.functional.linear(hidden_states, self.gate_up_proj[0]).chunk(2, dim=-1)",
                "gate = up = hidden_states",
            )
        },
        "does not show where it takes gate from up",
    ),
    "from outside": (
        {"toy/modeling_toy.py": REGULAR + "\n\nToyExperts.forward = fast\n"},
        "modeling_toy.py:13 changes ToyExperts from outside",
    ),
    "a computed flag": (
        {"toy/modeling_toy.py": REGULAR.replace("_implementation\n", "_implementation(has_gate=FLAG)\n")},
        "has a decorator with a computed",
    ),
    "a positional flag": (
        {"toy/modeling_toy.py": REGULAR.replace("_implementation\n", "_implementation(None, False)\n")},
        "or a positional flag",
    ),
}


@pytest.mark.parametrize(("files", "words"), CAUSES.values(), ids=CAUSES)
def test_each_cause_has_its_own_words(tmp_path, files, words):
    check_held(tmp_path, files, words)
    assert len({words for _, words in CAUSES.values()}) == len(CAUSES)
