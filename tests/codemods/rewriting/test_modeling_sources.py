"""A plan is rewritten only if every class that its experts may be is known, wherever the source of that class is."""

from __future__ import annotations

import pytest

from codemods.checking.check import check_paths
from codemods.rewriting.migrate import plan_rewrites
from tests.codemods.helpers import MIGRATED, PACKED, REGULAR, check_noop, codes, generated, rewrite, write_tree

IMPORTS = "import torch\nfrom torch import nn\nfrom ...integrations import use_experts_implementation\n"
TRANSPOSED = REGULAR.replace("_implementation\n", "_implementation(is_transposed=True)\n")
HALVED = "gate, up = nn.functional.linear(hidden_states, self.gate_up_proj[0]).chunk(2, dim=-1)"


def build_block(value, *, imports=""):
    """A model whose experts come from an expression."""
    return (
        f"{IMPORTS}{imports}\n\nclass ToyBlock(nn.Module):\n    def __init__(self, config):\n"
        f"        super().__init__()\n        self.experts = {value}\n\n\n"
        "class ToyLayer(nn.Module):\n    def __init__(self, config):\n        self.mlp = ToyBlock(config)\n\n\n"
        "class ToyModel(nn.Module):\n    def __init__(self, config: ToyConfig):\n"
        "        self.layers = nn.ModuleList([ToyLayer(config) for _ in range(2)])\n"
    )


def check_held(root, files, *words):
    """The plan stays, and the one finding names each of the words."""
    write_tree(root, {"models/toy/configuration_toy.py": PACKED} | files)
    outcome = rewrite(root)
    assert outcome.changes == ()
    assert codes(outcome) == ["MIG203"]
    message = outcome.findings[0].finding.message
    assert all(word in message for word in words), message


def check_migrated(root, files):
    write_tree(root, {"models/toy/configuration_toy.py": PACKED} | files)
    outcome = rewrite(root)
    assert codes(outcome) == []
    assert (root / "models/toy/configuration_toy.py").read_text("utf-8") == MIGRATED.lstrip("\n")


OTHER = "class Other:\n    pass\n"
REACHED = {
    "a module": ("from .moe import ToyExperts\n", {"moe.py": REGULAR}),
    "another name": ("from .moe import Fast as ToyExperts\n", {"moe.py": REGULAR.replace("ToyExperts", "Fast")}),
    "a package": (
        "from .moe import ToyExperts\n",
        {"moe/__init__.py": "from .fast import *\n", "moe/fast.py": REGULAR},
    ),
    "a re-export": (
        "from .moe import ToyExperts\n",
        {"moe.py": "from .fast import Fast as ToyExperts\n", "fast.py": REGULAR.replace("ToyExperts", "Fast")},
    ),
    "a shim": (
        "try:\n    from .fast import ToyExperts\nexcept ImportError:\n    from .slow import ToyExperts\n",
        {"fast.py": REGULAR, "slow.py": REGULAR},
    ),
    "an alias": ("from .moe import Fast\n\nToyExperts = Fast\n", {"moe.py": REGULAR.replace("ToyExperts", "Fast")}),
    "an absolute import": ("from models.toy.moe import ToyExperts\n", {"moe.py": REGULAR}),
}


@pytest.mark.parametrize("way", REACHED)
def test_names_are_followed_inside_the_tree(tmp_path, way):
    imports, files = REACHED[way]
    sources = {f"models/toy/{name}": text for name, text in files.items()}
    check_migrated(
        tmp_path, {"models/toy/modeling_toy.py": build_block("ToyExperts(config)", imports=imports), **sources}
    )


@pytest.mark.parametrize("way", REACHED)
def test_what_they_lead_to_decides(tmp_path, way):
    imports, files = REACHED[way]
    sources = {
        f"models/toy/{name}": text.replace("_implementation\n", "_implementation(is_transposed=True)\n")
        for name, text in files.items()
    }
    sources["models/toy/configuration_toy.py"] = PACKED
    sources["models/toy/modeling_toy.py"] = build_block("ToyExperts(config)", imports=imports)
    outcome = rewrite(write_tree(tmp_path, sources))
    assert outcome.changes == ()
    assert codes(outcome) == ["MIG205"] or codes(outcome) == ["MIG101"]


UNKNOWN = {
    "the other arm": (
        "FastExperts(config) if config.fast else ToyExperts(config)",
        "from fast_moe import FastExperts\n",
    ),
    "either arm": ("ToyExperts(config) if config.slow else FastExperts(config)", "from fast_moe import FastExperts\n"),
    "a choice by `or`": ("config.experts or ToyExperts(config)", ""),
    "a table": ("EXPERTS[config.kind](config)", "from fast_moe import EXPERTS\n"),
    "a function": ("build_experts(config)", "from fast_moe import build_experts\n"),
    "a module of a package": ("fast_moe.FastExperts(config)", "import fast_moe\n"),
    "a shim that leaves the tree": (
        "Experts(config)",
        "try:\n    from fast_moe import Experts\nexcept ImportError:\n    Experts = ToyExperts\n",
    ),
    "a star": ("FastExperts(config)", "from fast_moe import *\n"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_leaves_the_tree_is_unknown_and_holds(tmp_path, case):
    value, imports = UNKNOWN[case]
    source = build_block(value, imports=imports) + REGULAR
    line = next(number for number, text in enumerate(source.splitlines(), 1) if "self.experts = " in text)
    check_held(tmp_path, {"models/toy/modeling_toy.py": source}, f"modeling_toy.py:{line}")


def test_both_arms_that_agree_are_one_answer(tmp_path):
    source = build_block("ToyExperts(config) if config.fast else Fast(config)", imports="from .moe import Fast\n")
    moe = REGULAR.replace("ToyExperts", "Fast")
    check_migrated(tmp_path, {"models/toy/modeling_toy.py": source + REGULAR, "models/toy/moe.py": moe})


def test_both_arms_that_differ_hold(tmp_path):
    source = build_block("ToyExperts(config) if config.fast else Fast(config)", imports="from .moe import Fast\n")
    moe = TRANSPOSED.replace("ToyExperts", "Fast")
    check_held(tmp_path, {"models/toy/modeling_toy.py": source + REGULAR, "models/toy/moe.py": moe}, "moe.py:Fast")


@pytest.mark.parametrize(
    ("base", "imports"),
    [
        ("FastBase", "from fast_moe import FastBase\n"),
        ("fast_moe.layers.FastBase", "import fast_moe.layers\n"),
        ("FastBase", "from .layers import FastBase\n"),
    ],
)
def test_an_unknown_base_of_the_experts_holds(tmp_path, base, imports):
    source = build_block("ToyExperts(config)", imports=imports) + REGULAR.replace("nn.Module", base)
    check_held(tmp_path, {"models/toy/modeling_toy.py": source}, "ToyExperts", f"`{base}`")


def test_a_base_in_the_tree_is_read(tmp_path):
    source = build_block("ToyExperts(config)", imports="from .layers import Base\n")
    files = {
        "models/toy/modeling_toy.py": source + "class ToyExperts(Base):\n    pass\n",
        "models/toy/layers.py": REGULAR.replace("ToyExperts", "Base"),
    }
    check_migrated(tmp_path, files)


PER_EXPERT = """
class ToyConfig(PreTrainedConfig):
    base_model_tp_plan = {
        "layers.*.mlp.experts.*.gate_proj": "colwise",
        "layers.*.mlp.experts.*.down_proj": "rowwise",
    }
"""


def dead_keys(root, files):
    checked = check_paths([write_tree(root, {"models/toy/configuration_toy.py": PER_EXPERT} | files)])
    return [found.finding.key for found in checked.findings if found.finding.code == "MIG506"]


@pytest.mark.parametrize("way", REACHED)
def test_per_expert_keys_over_imported_stacked_experts_are_dead(tmp_path, way):
    imports, files = REACHED[way]
    sources = {f"models/toy/{name}": text for name, text in files.items()}
    source = build_block("ToyExperts(config)", imports=imports)
    found = dead_keys(tmp_path, {"models/toy/modeling_toy.py": source, **sources})
    assert found == ["layers.*.mlp.experts.*.gate_proj", "layers.*.mlp.experts.*.down_proj"]


@pytest.mark.parametrize("case", UNKNOWN)
def test_keys_over_unknown_experts_are_never_called_dead(tmp_path, case):
    value, imports = UNKNOWN[case]
    source = build_block(value, imports=imports) + REGULAR
    assert dead_keys(tmp_path, {"models/toy/modeling_toy.py": source}) == []


AUTO = """
MODEL_MAPPING_NAMES = OrderedDict(
    [
        ("toy", "ToyModel"),
        {mapped}
    ]
)
"""
HEIR = PACKED.replace("ToyConfig", "HeirConfig").replace(":\n", ':\n    model_type = "heir"\n', 1)


def build_family(mapped, source=None, other="models/toy/modeling_toy.py"):
    """A family with a modeling file, and one that has a configuration only."""
    source = source or build_block("ToyExperts(config)") + REGULAR
    return {
        "models/toy/configuration_toy.py": PACKED,
        "models/toy/modeling_toy.py": build_block("ToyExperts(config)") + REGULAR,
        "models/heir/configuration_heir.py": HEIR,
        "models/auto/modeling_auto.py": AUTO.replace("{mapped}", mapped),
        other: source,
    }


@pytest.mark.parametrize(
    "mapped",
    [
        '("heir", "ToyModel"),',
        "('heir', 'ToyModel'),",
        '("heir", ("ToyModel", "ToyForCausalLM")),',
        '(\n            "heir",\n            "ToyModel",\n        ),',
    ],
)
def test_a_family_without_modeling_file_is_that_of_its_class(tmp_path, mapped):
    files = build_family(mapped)
    if "ForCausalLM" in mapped:
        files["models/toy/modeling_toy.py"] += "\n\nclass ToyForCausalLM(nn.Module):\n    pass\n"
    outcome = rewrite(write_tree(tmp_path, files))
    assert codes(outcome) == []
    assert sorted(change.path.name for change in outcome.changes) == ["configuration_heir.py", "configuration_toy.py"]


@pytest.mark.parametrize("mapped", ["", '("heir", "LostModel"),', '("another", "ToyModel"),'])
def test_a_family_whose_class_is_not_found_is_held(tmp_path, mapped):
    outcome = rewrite(write_tree(tmp_path, build_family(mapped)))
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]
    assert codes(outcome) == ["MIG203"]
    assert "modeling_auto.py" in outcome.findings[0].finding.message


def test_the_class_of_another_family_decides(tmp_path):
    files = build_family(
        '("heir", "BigModel"),', build_block("BigExperts(config)").replace("Toy", "Big"), "models/big/modeling_big.py"
    )
    files["models/big/modeling_big.py"] += TRANSPOSED.replace("Toy", "Big")
    outcome = rewrite(write_tree(tmp_path, files))
    assert [change.path.name for change in outcome.changes] == ["configuration_toy.py"]
    assert [found.path.name for found in outcome.findings] == ["configuration_heir.py"]


def test_a_copy_that_holds_its_owner_back_is_named_with_its_reason(tmp_path):
    files = {
        "models/toy/configuration_toy.py": PACKED,
        "models/toy/modeling_toy.py": build_block("ToyExperts(config)") + REGULAR,
        "models/heir/modular_heir.py": (
            "from ..toy.configuration_toy import ToyConfig\n\n\nclass HeirConfig(ToyConfig):\n    model_type = 'heir'\n"
        ),
        "models/heir/configuration_heir.py": generated("heir", HEIR),
        "models/heir/modeling_heir.py": build_block("Fast(config)", imports="from fast_moe import Fast\n"),
    }
    outcome = plan_rewrites([write_tree(tmp_path, files)])
    assert outcome.changes == ()
    messages = [found.finding.message for found in outcome.findings if found.finding.code == "MIG203"]
    assert messages
    assert all("models/heir" in message and "modeling_heir.py:" in message for message in messages), messages


LINEAR = "nn.functional.linear(hidden_states, self.gate_up_proj[0])"
PLAIN_HALVES = [
    f"gate, up = torch.split({LINEAR}, [self.intermediate_dim, self.intermediate_dim], -1)",
    f"gate, up = torch.split({LINEAR}, self.intermediate_dim, dim=-1)",
    f"gate, up = {LINEAR}.split(self.intermediate_dim, dim=-1)",
    f"gate, up = {LINEAR}.split((self.intermediate_dim, self.intermediate_dim), -1)",
    f"gate, up = torch.tensor_split({LINEAR}, 2, dim=-1)",
    f"both = {LINEAR}\n        gate = both[..., :size]\n        up = both[..., size:]",
    f"both = {LINEAR}\n        gate, up = both[:, : self.width], both[:, self.width :]",
    f"both = {LINEAR}\n        gate = both.narrow(-1, 0, size)\n        up = both.narrow(-1, size, size)",
]
OTHER_PARTS = [
    f"gate, up = torch.split({LINEAR}, [self.small, self.large], -1)",
    f"gate, up = {LINEAR}.split(self.other, dim=-1)",
    f"gate, up = {LINEAR}.split(self.intermediate_dim, dim=0)",
    f"both = {LINEAR}\n        gate, up = both[..., : self.small], both[..., self.large :]",
    f"both = {LINEAR}\n        gate = up = both[..., : self.intermediate_dim]",
    f"both = {LINEAR}\n        gate = both.narrow(0, 0, size)\n        up = both.narrow(0, size, size)",
]


@pytest.mark.parametrize("halves", PLAIN_HALVES)
def test_plainly_concatenated_halves_are_read(tmp_path, halves):
    source = build_block("ToyExperts(config)") + REGULAR.replace(HALVED, halves)
    check_migrated(tmp_path, {"models/toy/modeling_toy.py": source})


@pytest.mark.parametrize("halves", OTHER_PARTS)
def test_parts_that_may_be_something_else_are_held(tmp_path, halves):
    source = build_block("ToyExperts(config)") + REGULAR.replace(HALVED, halves)
    check_held(tmp_path, {"models/toy/modeling_toy.py": source}, "modeling_toy.py:")


def test_experts_in_the_file_of_the_plan_are_read(tmp_path):
    text = IMPORTS + PACKED + build_block("ToyExperts(config)").removeprefix(IMPORTS) + REGULAR
    outcome = rewrite(write_tree(tmp_path, {"models/toy/toy.py": text}))
    assert codes(outcome) == []
    assert [change.path.name for change in outcome.changes] == ["toy.py"]


def test_a_configuration_alone_says_what_is_missing(tmp_path):
    outcome = check_noop(tmp_path, PACKED, modeling=None)
    assert codes(outcome) == ["MIG203"]
    assert "no modeling file is beside it" in outcome.findings[0].finding.message


CAUSES = {
    "a decorator": (REGULAR.replace("@use", "@compile_experts\n@use"), "`compile_experts`"),
    "a patch": (REGULAR + "\n\nToyExperts.forward = other\n", "from outside"),
    "a flag": (REGULAR.replace("_implementation\n", "_implementation(is_concatenated=FLAG)\n"), "flag"),
    "a parameter": (
        REGULAR.replace(
            "\n    def forward", "        self.scale = nn.Parameter(torch.empty(1, 2, 3))\n\n    def forward"
        ),
        "`scale`",
    ),
    "no halves": (REGULAR.replace(".chunk(2, dim=-1)", ""), "gate"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_has_its_own_words(tmp_path, cause):
    source, words = CAUSES[cause]
    check_held(tmp_path, {"models/toy/modeling_toy.py": build_block("ToyExperts(config)") + source}, words)
