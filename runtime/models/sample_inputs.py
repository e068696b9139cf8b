"""Random inputs for any model, made from the signature of its forward and the sizes in its config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from plans.errors import MigratorError, UsageError
from runtime.models.model import build_meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["sample_inputs"]

_TEXT_TOKENS = ("pad", "bos", "eos", "sep", "cls", "mask", "unk")
"""Special tokens that stand for text; all others, such as an image's, stand for inputs that are not given."""
_TEXT_AROUND = 4
"""The fewest tokens of text beside those that stand for an image."""


def sample_inputs(model: PreTrainedModel, rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random inputs for a model, the same for the same seed.

    Models of text get tokens, encoder-decoders those of both sides, models of images and sounds random ones of the
    sizes in their config, and models that read images in text one image for each row, where it is known how their
    tokens stand for it and the vocabulary has these. The first dim of every tensor is a multiple of the rows, in their
    order. The tokens of text come evenly from everywhere in the vocabulary.

    Args:
        model: the model, parallel or not, on meta or not; only its class and config matter.
        rows: the number of rows.
        length: the tokens in a row; rows with an image are a multiple of it if the image's tokens need more.
        seed: the seed.

    Raises:
        UsageError: it is not known what inputs the model takes.
    """
    return _Sampler(model, rows, length, torch.Generator().manual_seed(seed)).sample()


@dataclass(frozen=True)
class _Image:
    """One image for each row, and how the tokens of a row stand for it.

    Args:
        values: the arguments that hold the images.
        tokens: the number of tokens that stand for each image.
    """

    values: Mapping[str, torch.Tensor]
    tokens: int


@dataclass(frozen=True)
class _Sampler:
    model: PreTrainedModel
    rows: int
    length: int
    generator: torch.Generator

    @property
    def config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = self.model.config
        return config

    @cached_property
    def parameters(self) -> frozenset[str]:
        """The names of the arguments that the model's forward takes."""
        return frozenset(inspect.signature(type(self.model).forward).parameters)

    def sample(self) -> dict[str, torch.Tensor]:
        values = self._sample_main()
        if self.config.is_encoder_decoder and "decoder_input_ids" in self.parameters:
            decoder = getattr(self.config, "decoder", None) or self.config
            values["decoder_input_ids"] = self._sample_tokens(decoder, self.length)
        return values

    def _sample_main(self) -> dict[str, torch.Tensor]:
        main = self.model.main_input_name
        if "input_ids" in self.parameters and (main == "input_ids" or self._has_vocabulary()):
            return self._sample_text()
        if main == "pixel_values" and main in self.parameters:
            return {main: self._sample_images(self.config)}
        if main in ("input_features", "input_values") and main in self.parameters:
            return {main: self._sample_sound(main)}
        raise UsageError(
            f"{type(self.model).__name__}: it is not known how to make its {main}",
            hint="validate a model of text, images or sounds, or one whose config has the sizes of its inputs",
            model=type(self.model).__name__,
        )

    def _has_vocabulary(self) -> bool:
        return getattr(self.config.get_text_config(), "vocab_size", None) is not None

    def _sample_text(self) -> dict[str, torch.Tensor]:
        token = self._find_token("image_token_id", "image_token_index")
        image = self._sample_image_in_text() if token is not None and "pixel_values" in self.parameters else None
        if image is None or token is None:
            return {"input_ids": self._sample_tokens(self.config, self.length), **self._sample_types()}
        length = -(-(image.tokens + _TEXT_AROUND) // self.length) * self.length
        tokens = self._sample_tokens(self.config, length)
        start = self._find_token("vision_start_token_id")
        tokens[:, 2 : 2 + image.tokens] = token
        if start not in (None, token):
            tokens[:, 1] = start
        values = {"input_ids": tokens, **image.values}
        if "mm_token_type_ids" in self.parameters:
            values["mm_token_type_ids"] = (tokens == token).int()
        return values

    def _find_token(self, *names: str) -> int | None:
        """Return the first token that the config has under these names; one outside of the vocabulary is none."""
        numbers = (_get_number(self.config, name) for name in names)
        vocabulary = self.config.get_text_config().vocab_size
        return next((number for number in numbers if number is not None and 0 <= number < vocabulary), None)

    def _sample_types(self) -> dict[str, torch.Tensor]:
        """Return the segment of each token, for models with an embedding of several."""
        types = _get_number(self.config, "type_vocab_size") or 1
        if types < 2 or "token_type_ids" not in self.parameters:
            return {}
        return {"token_type_ids": torch.randint(types, (self.rows, self.length), generator=self.generator)}

    def _sample_tokens(self, config: PreTrainedConfig, length: int) -> torch.Tensor:
        """Return tokens, one from each of as many equal ranges of the vocabulary, in random order."""
        choices = _list_tokens(config)
        count = self.rows * length
        within = torch.rand(count, generator=self.generator, dtype=torch.float64)
        places = ((torch.arange(count) + within) * (len(choices) / count)).long().clamp(max=len(choices) - 1)
        return choices[places][torch.randperm(count, generator=self.generator)].reshape(self.rows, length)

    def _sample_normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def _sample_images(self, config: PreTrainedConfig) -> torch.Tensor:
        size = getattr(config, "image_size", None)
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        if len(sides) != 2:
            raise UsageError(
                f"{type(self.model).__name__}: its config has no `image_size` to make images of",
                hint="add the size to config.json, or validate a model of text, images or sounds",
                model=type(self.model).__name__,
            )
        return self._sample_normal(self.rows, int(getattr(config, "num_channels", 3)), *sides)

    def _sample_image_in_text(self) -> _Image | None:
        """Return images, None where it is not known how tokens stand for them."""
        vision: Any = getattr(self.config, "vision_config", None)
        if vision is None:
            return None
        if "image_grid_thw" in self.parameters:
            return self._sample_patch_grid(vision)
        if "image_position_ids" in self.parameters:
            return self._sample_patches(vision)
        if "image_sizes" in self.parameters and (sized := self._sample_sized_image(vision)):
            return sized
        return self._sample_square_image(vision)

    def _sample_patch_grid(self, vision: PreTrainedConfig) -> _Image | None:
        """Return images as flat patches with the sizes of their grids; each token stands for a square of patches."""
        merge, patch = _get_number(vision, "spatial_merge_size"), _get_number(vision, "patch_size")
        if merge is None or patch is None:
            return None
        side = 2 * merge
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
        width = channels * (_get_number(vision, "temporal_patch_size") or 1) * patch**2
        grids = torch.tensor([[1, side, side]] * self.rows)
        return _Image({"pixel_values": self._sample_normal(self.rows * side**2, width), "image_grid_thw": grids}, 4)

    def _sample_patches(self, vision: PreTrainedConfig) -> _Image | None:
        """Return images as patches with their places; each token stands for a square of patches."""
        pooled, patch = _get_number(vision, "pooling_kernel_size"), _get_number(vision, "patch_size")
        if pooled is None or patch is None:
            return None
        side = 2 * pooled
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)
        patches = self._sample_normal(self.rows, side**2, 3 * patch**2).sigmoid()
        return _Image({"pixel_values": patches, "image_position_ids": places.expand(self.rows, -1, -1).clone()}, 4)

    def _sample_sized_image(self, vision: PreTrainedConfig) -> _Image | None:
        """Return images with their sizes; each token stands for a square of patches."""
        merge, patch = _get_number(self.config, "spatial_merge_size"), _get_number(vision, "patch_size")
        if merge is None or patch is None:
            return None
        side = 2 * merge * patch
        images = self._sample_normal(self.rows, int(getattr(vision, "num_channels", 3)), side, side)
        return _Image({"pixel_values": images, "image_sizes": torch.tensor([[side, side]] * self.rows)}, 4)

    def _sample_square_image(self, vision: PreTrainedConfig) -> _Image | None:
        """Return square images; how many tokens stand for each, the model itself tells on meta."""
        try:
            images = self._sample_images(vision)
            whole: Any = build_meta_model(self.config).to("meta")
            features: Any = whole.get_image_features(pixel_values=images[:1].to("meta", next(whole.parameters()).dtype))
            pooled = getattr(features, "pooler_output", features)
            pooled = pooled[0] if isinstance(pooled, (tuple, list)) else pooled
            return _Image({"pixel_values": images}, prod(pooled.shape[:-1]))
        except MigratorError:
            return None
        except Exception:  # transformers' model classes may raise anything, where more than images is needed
            return None

    def _sample_sound(self, main: str) -> torch.Tensor:
        config: Any = self.config
        bins = _get_number(config, "num_mel_bins")
        if main == "input_features" and bins and (positions := _get_number(config, "max_source_positions")):
            return self._sample_normal(self.rows, bins, 2 * positions)  # which two convolutions halve
        if main == "input_features" and (width := bins or _get_number(config, "input_feat_per_channel")):
            return self._sample_normal(self.rows, 4 * self.length, width)
        if main == "input_values" and bins and (frames := _get_number(config, "max_length")):
            return self._sample_normal(self.rows, frames, bins)
        if main == "input_values" and (strides := getattr(config, "conv_stride", None)):
            return self._sample_normal(self.rows, 2 * prod(strides) * self.length)
        raise UsageError(
            f"{type(self.model).__name__}: its config does not say what sizes of sounds it takes",
            hint="add the sizes to config.json, or validate a model of text, images or sounds",
            model=type(self.model).__name__,
        )


def _get_number(config: PreTrainedConfig, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _list_tokens(config: PreTrainedConfig) -> torch.Tensor:
    """Return the tokens of a config's vocabulary that stand for text."""
    vocabulary: int = config.get_text_config().vocab_size
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    for token in _find_placeholders(config):
        if 0 <= token < vocabulary:
            allowed[token] = False
    return allowed.nonzero().flatten()


def _find_placeholders(config: PreTrainedConfig) -> Iterator[int]:
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name, value in vars(part).items() if part is not None else ():
            is_token = name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
            if is_token and name.split("_")[0] not in _TEXT_TOKENS:
                yield value
