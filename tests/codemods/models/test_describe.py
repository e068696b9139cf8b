"""What keys name: on small sources, and against real models built on meta."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest

from codemods.models.describe import Model, describe
from plans.model_facts import KeyTarget
from tests.codemods.helpers import REGULAR, write_tree

SOURCE = (
    """
import torch
from torch import nn
from ..other.modeling_other import OtherAttention


class ToyNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class ToyScaledEmbedding(nn.Embedding):
    pass


class ToyMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(
            config.hidden_size,  # many lines
            config.intermediate_size,
            bias=False,
        )
        self.down_proj = nn.Linear(1, 2) if config.flag else nn.Linear(2, 1)
        self.act = ACT2FN[config.hidden_act]


class ToyBigMLP(ToyMLP):
    def __init__(self, config):
        super().__init__(config)
        self.up: nn.Module = nn.Sequential(nn.Linear(1, 2), nn.GELU())


class ToyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.experts = ToyExperts(config)
        self.separate = nn.ModuleList([ToyMLP(config) for _ in range(config.num_experts)])
        self.gate = ToyNorm(1)


class ToyAttention(OtherAttention):
    def __init__(self, config):
        super().__init__(config)
        size = (config.heads, config.size)
        self.sinks = nn.Parameter(torch.empty(config.heads))
        self.table = nn.Parameter(torch.zeros((config.heads, config.size)) * 0.02)
        self.scale = nn.Parameter(torch.ones(*size))
        self.register_parameter("late", nn.Parameter(torch.empty(1, 2, 3)))


MIXERS = {"sparse": ToyBlock, "dense": ToyBigMLP}


class ToyLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        mixer = MIXERS[config.kinds[index]]
        self.mlp = mixer(config)
        self.self_attn = ToyAttention(config)
        self.loop = self.loop


class ToyTextModel(PreTrainedModel):
    config: ToyTextConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = ToyScaledEmbedding(1, 2)
        layers = []
        for index in range(3):
            layers.append(ToyLayer(config, index))
        self.layers = nn.ModuleList(layers)
        self.proj = nn.Linear(1, 1)


class ToyVisionModel(PreTrainedModel):
    config: ToyVisionConfig

    def __init__(self, config):
        super().__init__(config)
        self.proj = ToyNorm(1)
        self.inner = AutoModel.from_config(config)
        self.blocks = nn.ModuleList()
        for _ in range(2):
            self.blocks.append(ToyMLP(config))
"""
    + REGULAR
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Model(write_tree(tmp_path_factory.mktemp("toy"), {"modeling_toy.py": SOURCE}))


@pytest.mark.parametrize(
    ("key", "named", "rank"),
    [
        ("embed_tokens", "embedding", None),
        ("layers.*.mlp.gate_proj", "linear", None),
        ("layers.*.mlp.down_proj", "linear", None),
        ("layers.3.mlp.down_proj", "linear", None),
        ("layers.*.mlp.down_proj.weight", "parameter", 2),
        ("layers.*.mlp.down_proj.bias", "parameter", 1),
        ("layers.*.mlp.experts", "experts", None),
        ("layers.*.mlp.experts.down_proj", "parameter", 3),
        ("layers.*.mlp.separate.*.down_proj", "linear", None),
        ("layers.*.mlp.gate", "module", None),
        ("layers.*.mlp.gate.weight", "parameter", 1),
        ("layers.*.self_attn.sinks", "parameter", 1),
        ("layers.*.self_attn.table", "parameter", 2),
        ("layers.*.self_attn.scale", "parameter", None),
        ("layers.*.self_attn.late", "parameter", 3),
        ("blocks.*.gate_proj", "linear", None),
    ],
)
def test_what_keys_name(toy, key, named, rank):
    found = toy.describe(key)
    assert found is not None
    assert (found.kind, found.ndim) == (named, rank)
    assert toy.can_exist(key)


def test_where_it_was_read(toy):
    assert toy.describe("layers.*.mlp.experts") == KeyTarget("experts", None, "modeling_toy.py:ToyExperts")


@pytest.mark.parametrize(
    ("key", "exists"),
    [
        ("layers.*.mlp.down", False),
        ("layers.*.mlp.experts.w1", False),
        ("layers.*.mlp.experts.*.w1", False),
        ("layers.mlp.down_proj", False),
        ("blocks.*.experts", False),
        ("layers.*.mlp.down_proj.other", False),
        ("layers.*.mlp.act.weight", True),  # what ACT2FN holds is not read
        ("layers.*.self_attn.q_proj", True),  # from a class of another model's file
        ("inner.layers.*.q_proj", True),
        ("layers.*.loop", True),
        ("layers.*.mlp.up.0", True),  # one of two modules in a row
    ],
)
def test_what_cannot_be_told_is_not_described(toy, key, exists):
    assert toy.describe(key) is None
    assert toy.can_exist(key) is exists


def test_the_plans_class_decides_between_two_models(toy):
    assert toy.describe("proj") is None
    assert toy.describe("proj", "Absent") is None
    assert toy.describe("proj", "ToyTextConfig").kind == "linear"
    assert toy.describe("proj", "ToyVisionConfig").kind == "module"
    assert toy.describe("proj", "ToyVisionModel").kind == "module"


def test_a_model_without_modeling_source_asks_the_one_it_is_made_from(tmp_path):
    modular = "from ..toy.configuration_toy import ToyConfig\n\n\nclass NewConfig(ToyConfig):\n    pass\n"
    write_tree(
        tmp_path, {"toy/modeling_toy.py": SOURCE, "new/modular_new.py": modular, "bare/configuration_bare.py": ""}
    )
    assert describe(tmp_path / "new", "embed_tokens") == KeyTarget(
        "embedding", None, "modeling_toy.py:ToyScaledEmbedding"
    )
    assert describe(tmp_path / "bare", "embed_tokens") is None
    assert Model(tmp_path / "bare").can_exist("embed_tokens")


@pytest.mark.parametrize(
    "text",
    [
        "class A(nn.Module):\n    def f(self):\n        self.x = nn.Linear(((\n",
        "class A(nn.Module):\n    def f(self):\n        self.x = y = self.x = (lambda: 1\n",
        "class A(A):\n    def f(self):\n        self.x = self.y\n        self.y = self.x\n",
        "class A(B):\n    pass\nclass B(A):\n    def f(self):\n        x = x\n        self.x = x()\n",
        "class A:\n    def f(self):\n        self.x = " + "[" * 500 + "\n",
        "class A:\n    def f(self):\n        self.x = x" + "()" * 900 + "\n",
        "class A:\n    def f(self):\n        self.x = nn.Parameter(x" + " + x" * 900 + ")\n",
    ],
)
def test_broken_source_is_unknown_not_fatal(tmp_path, text):
    model = Model(write_tree(tmp_path, {"modeling_toy.py": text}))
    found = model.describe("x")
    assert found is None or found == KeyTarget("parameter")
    assert model.can_exist("x")
    assert not model.can_exist("x" + ".x" * 5000)


def actually(model, key):
    """What a key names in a built model, read with nothing of ours."""
    from torch import nn

    pattern = re.compile(re.escape(key).replace(r"\*", r"\d+"))
    found = {("parameter", one.ndim) for name, one in model.named_parameters() if pattern.fullmatch(name)}
    for name, module in model.named_modules():
        if pattern.fullmatch(name):
            stacks = any(one.ndim == 3 for one in module.parameters(recurse=False))
            kinds = {nn.Linear: "linear", nn.Embedding: "embedding"}
            kind = next((word for kind, word in kinds.items() if isinstance(module, kind)), None)
            found.add((kind or ("experts" if stacks else "module"), None))
    return found


def check_against_model(model_type):
    """Compare every plan key of a real model; returns how many were compared, 0 if the default config builds none."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel

    config_class = CONFIG_MAPPING[model_type]
    plan = {**(config_class.base_model_tp_plan or {}), **(getattr(config_class, "base_model_ep_plan", None) or {})}
    if not plan:
        return 0
    try:
        config = config_class()
        with torch.device("meta"):
            built = AutoModel.from_config(config)
    except Exception:  # whatever a default configuration lacks, it builds nothing to compare with
        return 0
    source = Model(Path(sys.modules[config_class.__module__].__file__).parent)
    compared = 0
    for key in plan:
        if expected := actually(built, key):
            found = source.describe(key, config_class.__name__)
            assert found is not None, (model_type, key)
            assert {(found.kind, found.ndim)} == expected, (model_type, key)
            compared += 1
    return compared


@pytest.mark.parametrize(
    ("model_type", "least"), [("qwen3_moe", 9), ("gpt_oss", 4), ("jamba", 3), ("llama4_text", 8), ("nemotron_h", 3)]
)
def test_real_models_agree(model_type, least, installed_transformers):
    assert check_against_model(model_type) >= least


@pytest.mark.full
def test_every_real_model_agrees(installed_transformers):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compared = [check_against_model(model_type) for model_type in CONFIG_MAPPING_NAMES]
    assert sum(map(bool, compared)) > 100
    assert sum(compared) > 900


def test_a_file_that_changes_is_read_again(tmp_path):
    write_tree(
        tmp_path, {"modeling_toy.py": "class A(nn.Module):\n    def f(self):\n        self.x = nn.Linear(1, 2)\n"}
    )
    assert describe(tmp_path, "x") == KeyTarget("linear")
    assert describe(tmp_path, "other") is None
    write_tree(
        tmp_path,
        {"modeling_toy.py": "class A(nn.Module):\n    def f(self):\n        self.other = nn.Embedding(1, 2)\n"},
    )
    assert describe(tmp_path, "x") is None
    assert describe(tmp_path, "other") == KeyTarget("embedding")


def test_a_file_without_classes_is_no_model(tmp_path):
    assert Model(write_tree(tmp_path, {"modeling_toy.py": "x = 1\n"})).can_exist("x")
