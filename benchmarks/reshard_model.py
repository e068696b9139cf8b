"""A checkpoint with the shapes of a Qwen3-MoE, as large as asked for, written in bounded memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from transformers import Qwen3MoeConfig

from runtime.checkpoint.files.safetensors import encode_header
from runtime.models.model import meta_model

EXPERTS = 32
FILE_BYTES = 2**30

Shapes = dict[str, tuple[int, ...]]
"""Of tensors by name; all of them are bfloat16."""


def config(layers: int) -> Qwen3MoeConfig:
    """Return a config with the layer sizes of Qwen3-30B-A3B, and fewer experts in each layer."""
    return Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=32768,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )


def stored_shapes(layers: int) -> Shapes:
    """Return the hub form's tensors."""
    shapes: Shapes = {}
    for name, parameter in meta_model(config(layers)).named_parameters():
        prefix, _, last = name.rpartition(".experts.")
        if not prefix:
            shapes[name] = tuple(parameter.shape)
            continue
        count, rows, columns = parameter.shape
        split = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[last]
        for expert in range(count):
            for projection in split:
                shapes[f"{prefix}.experts.{expert}.{projection}.weight"] = (rows // len(split), columns)
    return dict(sorted(shapes.items()))


def write(folder: Path, size: int, sparse: bool = False) -> int:
    """Write a checkpoint of about `read_size` bytes and return its exact size; a sparse one holds zeros."""
    one, two = (bytes_of(stored_shapes(count)) for count in (1, 2))
    layers = max(1, round((size - one) / (two - one)) + 1)
    folder.mkdir()
    files = divided(stored_shapes(layers))
    noise = np.random.default_rng(0).integers(0, 256, 2**24, np.uint8)
    index = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(folder / file, tensors, None if sparse else np.roll(noise, number))
        index |= dict.fromkeys(tensors, file)
    total = sum(map(bytes_of, files))
    text = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(text, indent=2) + "\n")
    config(layers).save_pretrained(folder)
    return total


def divided(shapes: Shapes) -> list[Shapes]:
    """Return tensors by the file that holds them, each file full once it has reached its size."""
    files: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if bytes_of(files[-1]) >= FILE_BYTES:
            files.append({})
        files[-1][name] = shape
    return files


def write_file(path: Path, tensors: Shapes, noise: np.ndarray | None) -> None:
    """Write a file of noise, no two parts of it the same, or one of zeros that the disk need not hold."""
    header = encode_header(((name, "BF16", shape) for name, shape in tensors.items()), {"format": "pt"})
    body = bytes_of(tensors)
    with path.open("wb") as stream:
        stream.write(header)
        if noise is not None:
            for start in range(0, body, len(noise)):
                stream.write(np.roll(noise, start // len(noise))[: body - start].data)
        stream.truncate(len(header) + body)


def bytes_of(tensors: Shapes) -> int:
    return sum(2 * int(np.prod(shape)) for shape in tensors.values())
