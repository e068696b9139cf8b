"""The digest: additive over any cut, equal to its definition, and not blind to errors that cancel in one lane."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoint.digest import BLOCK, Digest, block_weights, word_weights

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
