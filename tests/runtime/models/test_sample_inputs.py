"""Inputs made for a model make it compute with all of its parameters, and a model of unknown inputs is refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from plans.errors import UsageError
from runtime.models.model import meta_model
from runtime.models.sample_inputs import sample_inputs
from tests.tiny_multimodal import MULTIMODAL, multimodal_config, multimodal_model

UNUSED = {
    "whisper": {"model.encoder.embed_positions.weight"},  # fixed
    "bert": {"pooler.dense.weight", "pooler.dense.bias"},  # what it returns beside the last hidden state
    "wav2vec2": {"wav2vec2.masked_spec_embed"},  # for training
}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_model_computes_on_its_inputs_with_all_of_its_parameters(name: str) -> None:
    model = multimodal_model(name)
    inputs = sample_inputs(model, 2, 8, seed=3)
    output = model(**inputs)
    found = output.logits if hasattr(output, "logits") else output.last_hidden_state
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    without = {key for key, value in model.named_parameters() if value.grad is None}
    assert without == UNUSED.get(name, set())


@pytest.mark.parametrize("name", MULTIMODAL)
def test_inputs_need_no_weights_and_are_the_same_for_the_same_seed(name: str) -> None:
    model = meta_model(multimodal_config(name))
    first, second, other = (sample_inputs(model, 4, 8, seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert all(len(value) % 4 == 0 for value in first.values())


def test_a_row_with_an_image_keeps_the_multiple_of_its_length() -> None:
    model = meta_model(multimodal_config("gemma4"))
    assert sample_inputs(model, 1, 6)["input_ids"].shape == (1, 12)
    assert sample_inputs(model, 1, 16)["input_ids"].shape == (1, 16)


def test_an_image_whose_token_the_vocabulary_lacks_is_not_given() -> None:
    """Small models keep the tokens of the large one that their config was made from."""
    config = multimodal_config("gemma4")
    config.image_token_id = config.get_text_config().vocab_size
    assert sample_inputs(meta_model(config), 2, 8).keys() == {"input_ids"}


def test_an_image_starts_with_no_token_that_stands_for_it() -> None:
    """Small models may have one token for the image and for its start."""
    config = multimodal_config("qwen3_vl_moe")
    config.vision_start_token_id = config.image_token_id
    inputs = sample_inputs(meta_model(config), 2, 8)
    assert (inputs["input_ids"] == config.image_token_id).sum(1).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("config", "architecture", "what"),
    [
        (
            transformers.TimeSeriesTransformerConfig(prediction_length=4, d_model=16),
            "TimeSeriesTransformerModel",
            "it is not known how to make its past_values",
        ),
        (transformers.ResNetConfig(), "ResNetModel", "its config has no `image_size` to make images of"),
        (transformers.EncodecConfig(), "EncodecModel", "its config does not say what sizes of sounds it takes"),
    ],
    ids=["past values", "images", "sounds"],
)
def test_a_model_of_unknown_inputs_is_refused_by_name(
    config: transformers.PreTrainedConfig, architecture: str, what: str
) -> None:
    config.architectures = [architecture]
    with pytest.raises(UsageError, match=f"{architecture}: {what}") as refused:
        sample_inputs(meta_model(config), 2, 8)
    assert refused.value.hint in (
        "validate a model of text, images or sounds, or one whose config has the sizes of its inputs",
        "add the size to config.json, or validate a model of text, images or sounds",
        "add the sizes to config.json, or validate a model of text, images or sounds",
    )
