"""Conversions that users register with transformers: followed, or refused with a next step that works."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import Concatenate, WeightConverter

from plans.errors import ConversionError
from runtime.checkpoint.external.source import ExternalSettings, FilePattern
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder
from tests.external_files import DEEPSEEK, state_of, stored_in, write

HUB = ReshardTarget("hf")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HALVES = ["model.embed_tokens.first", "model.embed_tokens.second"]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Register = Callable[..., None]


@pytest.fixture
def register() -> Iterator[Register]:
    """Return a function that registers the conversions of llama until the test ends."""
    before = conversion_mapping.get_checkpoint_conversion_mapping("llama")
    yield lambda *entries: conversion_mapping.register_checkpoint_conversion_mapping("llama", [*entries], True)
    conversion_mapping.register_checkpoint_conversion_mapping("llama", before or [], overwrite=True)


def join_halves(operation: type[Concatenate]) -> WeightConverter:
    sources = [name.removeprefix("model.") for name in HALVES]
    return WeightConverter(sources, ["embed_tokens.weight"], [operation(0)])


class OneWay(Concatenate):
    """An operation that its author can load with, but not save."""

    @property
    def reverse_op(self) -> core_model_loading.ConversionOps:
        raise NotImplementedError("saving is not supported")


def test_an_embedding_in_halves_and_a_tied_head_are_not_stored_both(
    hub_folder: HubFolder, register: Register, tmp_path: Path
) -> None:
    hub, settings = hub_folder("llama"), ExternalSettings(FilePattern(DEEPSEEK), from_tp=1)
    state = stored_in(hub)
    register(join_halves(Concatenate))
    halves = dict(zip(HALVES, state[EMBEDDING].chunk(2), strict=True))
    others = {name: tensor for name, tensor in state.items() if name != EMBEDDING}
    both = write(tmp_path / "both", hub, others | halves | {HEAD: state[EMBEDDING]}, {})
    with pytest.raises(
        ConversionError, match=r"(?s)lm_head\.weight is tied, but stored twice.*hint: save the files with one of them"
    ):
        plan_reshard(both, target=HUB, external=settings)
    for name, one in (("halves", halves), ("head", {HEAD: state[EMBEDDING]})):
        assert plan_reshard(write(tmp_path / name, hub, others | one, {}), target=HUB, external=settings)


def test_what_transformers_cannot_save_is_stored_as_in_the_model(
    hub_folder: HubFolder, register: Register, tmp_path: Path
) -> None:
    hub, folder = hub_folder("llama"), tmp_path / "dcp"
    state = state_of(hub)
    dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    shutil.copy(hub / "config.json", folder)
    register(join_halves(OneWay))
    with pytest.raises(
        ConversionError,
        match=r"(?s)cannot convert LlamaForCausalLM to its hub form: .*saving is not supported.*"
        "hint: set `experts=fused` to store its tensors as the model holds them",
    ):
        plan_reshard(folder, target=HUB)
    execute_reshard(plan_reshard(folder, target=ReshardTarget("hf", experts="fused")), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())
