"""Operations on forms against transformers' real operations on tensors of coordinates."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import core_model_loading as real
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

from runtime.checkpoint.hub.operations import OPERATIONS, ConversionContext
from runtime.tensor_map.compose import invert
from runtime.tensor_map.tensor_map import TensorMap, TensorMapError, whole

Gather = Callable[[TensorMap, dict[str, torch.Tensor]], torch.Tensor]
Shapes = Mapping[str, Sequence[tuple[int, ...]]]

CONFIG = SimpleNamespace(
    get_text_config=lambda: SimpleNamespace(streams=3, unpadded_vocab_size=4, vocab_size=7),
    num_attention_heads=2,
    vision_config=SimpleNamespace(num_attention_heads=3),
)
QKV = ["q", "k", "v"]
NEWER = "Inkling2UnpadVocab"
"""An operation since transformers 5.24."""
ROPE = {"subconfig_key": "vision_config", "permute_layer_names": ["q", "k"]}


@dataclass(frozen=True)
class Case:
    """A converter: its operations, the shapes stored by source pattern, and its target patterns.

    Args:
        model: the model's own shapes, where an operation asks for them.
    """

    operations: Sequence[real.ConversionOps]
    stored: Shapes
    targets: Sequence[str]
    model: Mapping[str, tuple[int, ...]] | None = None


def cases(a: int, b: int, c: int) -> dict[str, Case]:
    """Return converters over sizes of all kinds, those that the installed release has."""
    experts = {"gate.*.w": [(a, b)] * c, "up.*.w": [(a, b)] * c}
    both = {"gate.*.w": [(a, b)] * 2 * c, "up.*.w": [(a, b)] * 2 * c}
    kernel = {"in_channels": a, "kernel_size": (b, c, 2)}
    return {
        "merge alone": Case([real.MergeModulelist(0)], {"w.*": [(a, b)] * c}, ["experts"]),
        "merge, another dim": Case([real.MergeModulelist(1)], {"w.*": [(a, b)] * c}, ["experts"]),
        "merge and concatenate": Case([real.MergeModulelist(0), real.Concatenate(1)], experts, ["gate_up"]),
        "chunk and split": Case([real.Chunk(1), real.SplitModulelist(0)], {"gate_up": [(c, 2 * a, b)]}, list(experts)),
        "concatenate": Case([real.Concatenate(0)], {"a": [(a, c)], "b": [(b, c)]}, ["c"]),
        "chunk": Case([real.Chunk(0)], {"qkv": [(3 * a, b)]}, QKV),
        "chunk the last dim": Case([real.Chunk(-1)], {"qkv": [(a, 3 * b)]}, QKV),
        "chunk by the config": Case([real.Chunk(0, "streams")], {"w": [(3 * a, b)]}, ["s.*.w"]),
        "split": Case(
            [real.Split(0)], {"qkv": [(a + b + c, 4)]}, QKV, {"layer.q": (a, 4), "layer.k": (b, 4), "layer.v": (c, 4)}
        ),
        "split into a list": Case([real.SplitModulelist(0)], {"w": [(a, b, 1)]}, ["experts.*.w"]),
        "transpose": Case([real.Transpose(0, 1)], {"w": [(a, b)]}, ["t"]),
        # Never square: the real operation leaves a square tensor as it is, whatever lies beside it.
        "transpose where needed": Case(
            [real.Transpose(0, 1, check_dims=True)], {"w": [(a, b + 5)]}, ["t"], {"layer.t": (b + 5, a)}
        ),
        "leave as it is": Case(
            [real.Transpose(0, 1, check_dims=True)], {"w": [(b + 5, a)]}, ["t"], {"layer.t": (b + 5, a)}
        ),
        "transpose and chunk": Case([real.Transpose(0, 1), real.Chunk(0)], {"w": [(a, 3 * b)]}, QKV),
        "interleave": Case([real.Interleave(1)], {"w13": [(a, 2 * b, c)]}, ["gate_up"]),
        "interleave back": Case([real.Interleave(1, inverse=True)], {"gate_up": [(a, 2 * b, c)]}, ["w13"]),
        "interleave and chunk": Case([real.Interleave(0), real.Chunk(0)], {"w13": [(2 * a, b)]}, ["gate", "up"]),
        "concatenate and interleave": Case(
            [real.Concatenate(0), real.Interleave(0, inverse=True)], {"gate": [(a, b)], "up": [(a, b)]}, ["w13"]
        ),
        "rope": Case([real.PermuteForRope()], {"wq": [(4 * a, b)]}, ["q_proj"]),
        "rope of a bias": Case([real.PermuteForRope()], {"wq": [(4 * a,)]}, ["q_proj"]),
        "rope back": Case([real.PermuteForRope(inverse=True)], {"q_proj": [(4 * a, b)]}, ["wq"]),
        "chunk and rope of two": Case([real.Chunk(0), real.PermuteForRope(**ROPE)], {"qkv": [(18 * a, b)]}, QKV),
        "rope of two and concatenate": Case(
            [real.PermuteForRope(**ROPE, inverse=True), real.Concatenate(0)], {n: [(6 * a, b)] for n in QKV}, ["qkv"]
        ),
        "unfuse for rope": Case([real.VisionUnfuseAndPermuteForRope(0, ["q", "k"])], {"qkv": [(18 * a, b)]}, QKV),
        "fuse for rope": Case(
            [real.VisionFuseAndPermuteForRope(0, ["q", "k"])], {n: [(6 * a, b)] for n in QKV}, ["qkv"]
        ),
        "convolution to linear": Case([real.Conv3dToLinear(**kernel)], {"conv": [(4, a, b, c, 2)]}, ["linear"]),
        "linear already": Case([real.Conv3dToLinear(**kernel)], {"conv": [(4, a)]}, ["linear"]),
        "linear to convolution": Case([real.LinearToConv3d(**kernel)], {"linear": [(4, a * b * c * 2)]}, ["conv"]),
        "text and vision": Case([real.ErnieFuseAndSplitTextVisionExperts(0, 1)], both, ["text", "vision"]),
        "text and vision back": Case(
            [real.ErnieSplitAndDecoupleTextVisionExperts(0, 1)],
            {"text": [(c, 2 * a, b)], "vision": [(c, 2 * a, b)]},
            list(both),
        ),
        **(newer_cases(a, b, c) if hasattr(real, NEWER) else {}),
    }


def newer_cases(a: int, b: int, c: int) -> dict[str, Case]:
    """Return converters of transformers 5.24 and later."""
    return {
        "merge message queries": Case(
            [real.Inkling2LoopMergeMessageQueries()], {"q": [(2 * a, b)], "kv": [(2 * a, b)]}, ["m"]
        ),
        "split message queries": Case(
            [real.Inkling2LoopMergeMessageQueries(inverse=True)], {"m": [(a, 4, b)]}, ["q", "kv"]
        ),
        "experts in the model's dtype": Case([real.Inkling2LoopDequantizeExperts()], {"w": [(a, b, c)]}, ["experts"]),
        "a vocabulary without padding": Case(
            [real.Inkling2UnpadVocab()], {"w": [(4, b)]}, ["head"], {"layer.head": (4, b)}
        ),
    }


def run(case: Case) -> tuple[dict[str, TensorMap], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a case's results as forms and as the real operations' tensors, and the tensors they were made of."""
    numbers = count(step=10_000)
    tensors = {
        f"{pattern}.{index}": torch.arange(prod(shape)).reshape(shape) + next(numbers)
        for pattern, shapes in case.stored.items()
        for index, shape in enumerate(shapes)
    }
    names = {pattern: [f"{pattern}.{index}" for index in range(len(s))] for pattern, s in case.stored.items()}
    expected = {pattern: [tensors[name] for name in group] for pattern, group in names.items()}
    found = {pattern: [whole(name, tensors[name].shape) for name in group] for pattern, group in names.items()}
    layer = f"layer.{case.targets[0]}"
    shapes = case.model or {}
    context = ConversionContext(list(case.stored), case.targets, layer, shapes, CONFIG)
    for operation in case.operations:
        expected = operation.convert(
            expected,
            source_patterns=list(case.stored),
            target_patterns=list(case.targets),
            full_layer_name=layer,
            model=SimpleNamespace(get_parameter=lambda name: torch.empty(shapes[name], dtype=torch.int64)),
            config=CONFIG,
        )
        found = OPERATIONS[type(operation).__name__](operation, found, context)
    results = {name: (value[0] if isinstance(value, list) else value).clone() for name, value in expected.items()}
    return {name: form for name, (form,) in found.items()}, results, tensors


SIZE = st.integers(1, 5)


@pytest.mark.parametrize("case", cases(1, 1, 1))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(a=SIZE, b=SIZE, c=SIZE)
def test_forms_equal_the_real_operation_and_lead_back(case: str, a: int, b: int, c: int, gather: Gather) -> None:
    forms, expected, tensors = run(cases(a, b, c)[case])
    assert forms.keys() == expected.keys()
    for name, form in forms.items():
        assert torch.equal(gather(form, tensors), expected[name]), name
    for name, form in invert(forms, {name: tuple(tensor.shape) for name, tensor in tensors.items()}).items():
        assert torch.equal(gather(form, expected), tensors[name]), name


# What stays as it is has no reverse of its own, and concatenated parts of unequal sizes are chunked in equal ones.
ONE_WAY = ("linear already", "leave as it is", "concatenate", "a vocabulary without padding")


@pytest.mark.parametrize("case", [name for name in cases(1, 1, 1) if name not in ONE_WAY])
def test_the_real_reverse_of_an_operation_leads_back(case: str, gather: Gather) -> None:
    """What transformers does when it saves is what forms do when they are turned round."""
    there = cases(3, 5, 2)[case]
    forms, _, tensors = run(there)
    operations = [operation.reverse_op for operation in reversed(there.operations)]
    assert {type(operation).__name__ for operation in operations} <= OPERATIONS.keys()
    stored = {
        target: [form.shape for name, form in forms.items() if re.fullmatch(target.replace("*", r"\d+"), name)]
        for target in there.targets
    }
    model = {f"layer.{name}": shapes[0] for name, shapes in there.stored.items()}
    back, expected, results = run(Case(operations, stored, list(there.stored), model))
    assert [form.shape for form in back.values()] == [tensor.shape for tensor in tensors.values()]
    assert all(torch.equal(gather(form, results), expected[name]) for name, form in back.items())


def test_every_known_operation_is_one_of_transformers_and_is_tested() -> None:
    tested = {type(operation).__name__ for case in cases(1, 1, 1).values() for operation in case.operations}
    assert tested == {name for name in OPERATIONS if issubclass(getattr(real, name, object), real.ConversionOps)}
    assert not hasattr(real, NEWER) or tested == OPERATIONS.keys()


def test_every_operation_of_the_conversion_mapping_is_known() -> None:
    used = {
        type(operation).__name__
        for entries in _build_checkpoint_conversion_mapping().values()
        for entry in entries
        if isinstance(entry, real.WeightConverter)
        for operation in (*entry.operations, *(operation.reverse_op for operation in entry.operations))
    }
    assert used <= OPERATIONS.keys()
    assert {"Interleave", "PermuteForRope", "ErnieFuseAndSplitTextVisionExperts"} <= used


def test_what_the_real_operation_refuses_is_refused() -> None:
    two = {"a": [whole("a", (4,))], "b": [whole("b", (4,))]}
    context = ConversionContext(["a", "b"], ["x", "y"], "layer.x", {}, CONFIG)
    kernel = {"in_channels": 2, "kernel_size": (1, 1, 2)}
    for operation in (
        real.Chunk(0),
        real.Concatenate(0),
        real.Transpose(0, 1),
        real.Split(0),
        real.PermuteForRope(),
        real.Conv3dToLinear(**kernel),
        real.LinearToConv3d(**kernel),
    ):
        with pytest.raises(TensorMapError):
            OPERATIONS[type(operation).__name__](operation, dict(two), context)


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        (real.Interleave(0), (3, 2)),
        (real.Interleave(-1), (2, 2)),
        (real.PermuteForRope(), (6, 2)),
        (real.Conv3dToLinear(2, (1, 1, 2)), (3, 2, 2)),
        (real.LinearToConv3d(2, (1, 1, 2)), (3, 5)),
    ],
)
def test_shapes_that_the_real_operation_refuses_are_refused(
    operation: real.ConversionOps, shape: tuple[int, ...]
) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        operation.convert({"a": [torch.zeros(shape)]}, source_patterns=["a"], target_patterns=["x"], config=CONFIG)
    context = ConversionContext(["a"], ["x"], "layer.x", {}, CONFIG)
    with pytest.raises(TensorMapError):
        OPERATIONS[type(operation).__name__](operation, {"a": [whole("a", shape)]}, context)


def test_experts_without_their_partners_are_refused() -> None:
    context = ConversionContext(["gate", "up"], ["text", "vision"], "layer.text", {}, CONFIG)
    for name in ("ErnieFuseAndSplitTextVisionExperts", "ErnieSplitAndDecoupleTextVisionExperts"):
        with pytest.raises(TensorMapError, match="nothing for up"):
            OPERATIONS[name](getattr(real, name)(), {"gate": [whole("a", (2, 4, 3))] * 2}, context)


since_5_24 = pytest.mark.skipif(not hasattr(real, NEWER), reason="operations that transformers 5.24 added")


@since_5_24
@pytest.mark.parametrize("rows", [5, 7, 9])
def test_rows_that_pad_a_vocabulary_are_dropped_but_not_forgotten(rows: int, gather: Gather) -> None:
    tensor = torch.arange(rows * 3).reshape(rows, 3)
    operation, names = real.Inkling2UnpadVocab(), {"source_patterns": ["w"], "target_patterns": ["head"]}
    model = SimpleNamespace(get_parameter=lambda name: torch.empty(4, 3, dtype=torch.int64))
    expected = operation.convert({"w": [tensor]}, config=CONFIG, model=model, full_layer_name="head", **names)
    context = ConversionContext(["w"], ["head"], "head", {}, CONFIG)
    (head,) = OPERATIONS["Inkling2UnpadVocab"](operation, {"w": [whole("w", (rows, 3))]}, context)["head"]
    assert torch.equal(gather(head, {"w": tensor}), expected["head"])
    (rest,) = context.dropped
    assert torch.equal(gather(rest, {"w": tensor}), tensor[4:])


@since_5_24
def test_rows_of_zeros_are_made_of_nothing_stored() -> None:
    context = ConversionContext(["head"], ["w"], "w", {}, CONFIG)
    with pytest.raises(TensorMapError, match="stored nowhere"):
        OPERATIONS["Inkling2UnpadVocab"](real.Inkling2UnpadVocab(inverse=True), {"head": [whole("h", (4, 3))]}, context)


@since_5_24
@pytest.mark.parametrize("scales", [["scale"], ["scale", "amax", "denominator"], ["amax"]])
def test_quantized_experts_are_not_taken_for_plain_ones(scales: list[str]) -> None:
    stored = {name: [whole(name, (2, 3, 4))] for name in ["w", *scales]}
    context = ConversionContext(["w", "scale", "amax", "denominator"], ["experts"], "experts", {}, CONFIG)
    with pytest.raises(TensorMapError, match="dequantizes it on loading"):
        OPERATIONS["Inkling2LoopDequantizeExperts"](real.Inkling2LoopDequantizeExperts(), stored, context)


@since_5_24
def test_scales_without_their_weight_are_refused() -> None:
    """transformers would take the scales for the weight."""
    context = ConversionContext(["w", "scale", "amax", "denominator"], ["experts"], "experts", {}, CONFIG)
    stored = {"scale": [whole("scale", (2, 3, 4))]}
    with pytest.raises(TensorMapError, match="nothing for w"):
        OPERATIONS["Inkling2LoopDequantizeExperts"](real.Inkling2LoopDequantizeExperts(), stored, context)
