"""The digest: additive over any cut, equal to its definition, and not blind to errors that cancel in one lane."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoint.digest import BLOCK, Digest, block_weights, word_weights
from runtime.checkpoint.verifying.tensor_digest import digest_tensor

MASK = 2**64 - 1
WORDS = 3 * BLOCK + 5


def digest(content: bytes) -> str:
    result = Digest()
    result.add(0, np.frombuffer(content, np.uint8))
    return str(result)


def by_definition(content: bytes) -> str:
    """The definition in Python integers, one word after the other."""
    lanes = [0, 0]
    padded = content + bytes(-len(content) % 8)
    for index in range(len(padded) // 8):
        word = int.from_bytes(padded[index * 8 : index * 8 + 8], "little")
        for lane, value in ((0, word), (1, word >> 32)):
            inner = int(word_weights(lane)[index % BLOCK])
            outer = int(block_weights(lane, index // BLOCK, 1)[0])
            lanes[lane] = (lanes[lane] + inner * outer * value) & MASK
    return f"{lanes[0]:016x}{lanes[1]:016x}"


@pytest.mark.parametrize("in_rows", [False, True])
def test_it_allocates_nothing_per_byte_once_a_thread_has_its_buffer(in_rows: bool) -> None:
    content = np.full(2**22, 7, np.uint8)

    def add() -> None:
        if in_rows:
            assert Digest().add_rows(0, content.view("<u8").reshape(-1, 1024), 2 * 8192)
        else:
            Digest().add(0, content)

    add()
    tracemalloc.start()
    try:
        add()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(content) // 32


@given(size=st.integers(0, WORDS * 8), seed=st.integers(0, 2**32), cuts=st.lists(st.integers(0, WORDS * 8), max_size=9))
def test_it_is_additive_over_any_partition(size: int, seed: int, cuts: list[int]) -> None:
    content = np.random.default_rng(seed).bytes(size)
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    pieces = list(pairwise(edges))
    total = Digest()
    for start, stop in sorted(pieces, key=lambda piece: hash((piece, seed))):
        total.add(start, np.frombuffer(content[start:stop], np.uint8))
    assert str(total) == digest(content)


@settings(max_examples=10)
@given(size=st.integers(0, WORDS * 8), seed=st.integers(0, 2**32))
def test_it_is_what_the_definition_says(size: int, seed: int) -> None:
    content = np.random.default_rng(seed).bytes(size)
    assert digest(content) == by_definition(content)


@given(
    rows=st.integers(1, 400),
    width=st.integers(1, 60),
    gap=st.integers(0, 70),
    offset=st.integers(0, BLOCK * 9),
    unit=st.sampled_from([1, 2, 8, 64]),
    seed=st.integers(0, 2**32),
)
def test_rows_sum_to_what_their_bytes_one_by_one_sum_to(
    rows: int, width: int, gap: int, offset: int, unit: int, seed: int
) -> None:
    width, stride, offset = width * unit, (width + gap) * unit, offset * unit
    content = np.frombuffer(np.random.default_rng(seed).bytes(rows * width), np.uint8).reshape(rows, width)
    pieces = Digest()
    for row, piece in enumerate(content):
        pieces.add(offset + row * stride, piece)
    together = Digest()
    taken = together.add_rows(offset, content.view(f"<u{unit}") if unit < 8 else content.view("<u8"), stride)
    assert taken == (rows == 1) or unit >= 8
    assert str(together) == str(pieces if taken else Digest())
    assert str(digest_tensor(torch.from_numpy(content.copy()), offset, stride)) == str(pieces)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.float32])
def test_tensors_have_the_digest_of_their_bytes(dtype: torch.dtype) -> None:
    tensor = torch.randn(37, 121).to(dtype)
    assert str(digest_tensor(tensor)) == digest(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    assert str(digest_tensor(tensor.T)) == digest(tensor.T.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    flat = tensor.reshape(-1)[1:]  # which begins in memory where no word does
    assert str(digest_tensor(flat)) == digest(flat.clone().view(torch.uint8).numpy().tobytes())
    assert str(digest_tensor(tensor[:0])) == str(digest_tensor(torch.tensor([], dtype=dtype))) == digest(b"")
    parts = Digest()
    for first, part in ((0, tensor[:, :50]), (50, tensor[:, 50:])):
        parts.join(digest_tensor(part, first * dtype.itemsize, 121 * dtype.itemsize))
    assert str(parts) == str(digest_tensor(tensor))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_have_the_same_digest() -> None:
    tensor = torch.randn(3000, 1001).to(torch.bfloat16)
    assert str(digest_tensor(tensor.cuda())) == str(digest_tensor(tensor))
    assert str(digest_tensor(tensor.cuda(), 6, 2004)) == str(digest_tensor(tensor, 6, 2004))


def test_a_digest_goes_on_from_its_text() -> None:
    content = np.arange(5000, dtype=np.uint8)
    begun = Digest()
    begun.add(0, content[:1237])
    resumed = Digest.parse(str(begun))
    resumed.add(1237, content[1237:])
    assert str(resumed) == digest(content.tobytes())


def test_its_value_is_fixed_for_all_time() -> None:
    """Manifests hold digests: another value here means that old manifests no longer verify."""
    assert digest(b"") == "0" * 32
    assert digest(bytes(range(256)) * 100) == "2dffa1e5e3359d606c1317ba2828c590"


def test_weights_are_odd_and_far_apart() -> None:
    weights = [int(w) for lane in (0, 1) for w in (*word_weights(lane), *block_weights(lane, 0, 4096))]
    assert all(weight % 2 for weight in weights)
    assert len({weight % 2**33 for weight in weights}) > len(weights) - 3


def test_errors_that_cancel_in_one_lane_are_seen() -> None:
    random = np.random.default_rng(0)
    clean = random.standard_normal((256, 512)).astype(np.float16)
    seen = {digest(clean.tobytes())}

    def see(damaged: np.ndarray) -> None:
        value = digest(damaged.tobytes())
        assert value not in seen
        seen.add(value)

    bits = clean.view(np.uint64).reshape(-1)
    for _ in range(300):
        flipped = bits.copy()
        pair = random.choice(len(bits), 2, replace=False)
        flipped[pair] ^= np.uint64(1 << 63)
        see(flipped)
    for step in (1, 2, 4, 64, 512):
        negated = clean.copy().reshape(-1)
        negated[::step] *= -1
        see(negated)
    for first, second in ((0, 1), (3, 200), (17, 18)):
        swapped = clean.copy()
        swapped[[first, second]] = swapped[[second, first]]
        see(swapped)
    for square in ((0, 1, 0, 1), (5, 9, 8, 100)):
        rectangle = bits.reshape(-1, 128).copy()
        rows, columns = square[:2], square[2:]
        rectangle[np.ix_(rows, columns)] ^= np.uint64(1 << 63)
        see(rectangle)
