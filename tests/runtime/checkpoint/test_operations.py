"""Operations on forms against transformers' real operations on tensors of coordinates."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from transformers import core_model_loading as real

from runtime.checkpoint.extents import Form, FormError, whole
from runtime.checkpoint.operations import OPERATIONS, Context

Gather = Callable[[Form, dict[str, torch.Tensor]], torch.Tensor]

CONFIG = SimpleNamespace(get_text_config=lambda: SimpleNamespace(streams=3))
EXPERTS = {"gate": [(4, 5)] * 3, "up": [(4, 5)] * 3}
SHAPES = {"layer.q": (6, 4), "layer.k": (2, 4), "layer.v": (2, 4), "layer.t": (5, 4)}

CASES = {
    "merge alone": ([real.MergeModulelist(0)], {"w": [(4, 5)] * 3}, ["experts"]),
    "merge, another dim": ([real.MergeModulelist(1)], {"w": [(4, 5)] * 2}, ["experts"]),
    "merge and concatenate": ([real.MergeModulelist(0), real.Concatenate(1)], EXPERTS, ["gate_up"]),
    "concatenate": ([real.Concatenate(0)], {"a": [(2, 3)], "b": [(4, 3)]}, ["c"]),
    "chunk": ([real.Chunk(0)], {"qkv": [(9, 4)]}, ["q", "k", "v"]),
    "chunk the last dim": ([real.Chunk(-1)], {"qkv": [(2, 6)]}, ["q", "k", "v"]),
    "chunk by the config": ([real.Chunk(0, "streams")], {"w": [(6, 2)]}, ["s.*.w"]),
    "split": ([real.Split(0)], {"qkv": [(10, 4)]}, ["q", "k", "v"]),
    "split into a list": ([real.SplitModulelist(0)], {"w": [(3, 4, 1)]}, ["experts.*.w"]),
    "transpose": ([real.Transpose(0, 1)], {"w": [(4, 5)]}, ["t"]),
    "transpose where needed": ([real.Transpose(0, 1, check_dims=True)], {"w": [(4, 5)]}, ["t"]),
    "leave as it is": ([real.Transpose(0, 1, check_dims=True)], {"w": [(5, 4)]}, ["t"]),
    "transpose and chunk": ([real.Transpose(0, 1), real.Chunk(0)], {"w": [(4, 6)]}, ["q", "k", "v"]),
}


@pytest.mark.parametrize("case", CASES)
def test_forms_equal_the_real_operation(case: str, gather: Gather) -> None:
    operations, stored, targets = CASES[case]
    tensors = {
        f"{pattern}.{index}": torch.arange(index * 1000 + number * 100_000, index * 1000 + number * 100_000 + 10_000)[
            : shape[0] * shape[1] * (shape[2] if len(shape) > 2 else 1)
        ].reshape(shape)
        for number, (pattern, group) in enumerate(stored.items())
        for index, shape in enumerate(group)
    }
    names = {pattern: [f"{pattern}.{index}" for index in range(len(group))] for pattern, group in stored.items()}
    layer = f"layer.{targets[0]}"
    model = SimpleNamespace(get_parameter=lambda name: torch.empty(SHAPES[name]))
    expected = {pattern: [tensors[name] for name in group] for pattern, group in names.items()}
    found = {pattern: [whole(name, tensors[name].shape) for name in group] for pattern, group in names.items()}
    context = Context(list(stored), targets, layer, SHAPES, CONFIG)
    for operation in operations:
        expected = operation.convert(
            expected,
            source_patterns=list(stored),
            target_patterns=targets,
            full_layer_name=layer,
            model=model,
            config=CONFIG,
        )
        found = OPERATIONS[type(operation).__name__](operation, found, context)
    assert found.keys() == expected.keys()
    for name, (form,) in found.items():
        tensor = expected[name][0] if isinstance(expected[name], list) else expected[name]
        assert torch.equal(gather(form, tensors), tensor)


def test_every_known_operation_is_one_of_transformers_and_is_tested() -> None:
    tested = {type(operation).__name__ for operations, _, _ in CASES.values() for operation in operations}
    assert tested == OPERATIONS.keys()
    assert all(issubclass(getattr(real, name), real.ConversionOps) for name in OPERATIONS)


def test_what_the_real_operation_refuses_is_refused() -> None:
    two = {"a": [whole("a", (4,))], "b": [whole("b", (4,))]}
    context = Context(["a", "b"], ["x", "y"], "layer.x", {}, CONFIG)
    for operation in (real.Chunk(0), real.Concatenate(0), real.Transpose(0, 1), real.Split(0)):
        with pytest.raises(FormError):
            OPERATIONS[type(operation).__name__](operation, dict(two), context)
