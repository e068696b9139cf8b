"""The digest of a parameter: two 64-bit sums over its bytes, the same however the bytes are split and ordered.

A general hash would depend on the order in which ranks, threads and layouts split a parameter. This one adds up: the
digests of disjoint parts sum to the digest of the whole.

The parameter's bytes in logical row-major order are little-endian 64-bit words u_i. Lane one is the sum of W1_i * u_i,
lane two the sum of W2_i * (u_i >> 32), both modulo 2^64. A part that begins or ends within a word contributes its bytes
at their position in the word, and zeros elsewhere.

Weights are odd, so lane one sees any error in a single word. Errors that are multiples of 2^63, such as two flipped
signs, cancel in lane one with any weights; lane two sees the same bits as multiples of 2^31, which cancel only
if the weights agree modulo 2^33. W_i = T[i mod 2048] * S[i div 2048] keeps weights cheap: a block's sum is one dot
product and one multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from runtime.checkpoint.scratch import Scratch

__all__ = ["ABOUT", "BLOCK", "MULTIPLIERS", "SEEDS", "STEP", "Digest", "block_weights", "word_weights"]

Words = NDArray[np.uint64]

ABOUT: Final = (
    "Each digest is two 64-bit sums over a tensor's bytes, the same in every layout. It finds damage, not tampering: "
    "other bytes with the same digest can be made on purpose."
)
"""What files that record digests say of them."""

BLOCK: Final = 2048
"""Words in a block; all words of a block share one factor of their weights."""

_WORD: Final = 8
_HIGH: Final = np.uint64(32)
_MASK: Final = 2**64 - 1
_BATCH: Final = 16
_MIN_ROWS_PER_CALL: Final = 4
"""With fewer rows at each position in a block, one call per position costs more than it saves."""

_SCRATCH: Final = Scratch()

SEEDS: Final = ((0x6D69677261746F72, 0x706C616E73686172), (0x636865636B706F69, 0x64696765737432F1))
"""The seeds of the inner and outer weights, by lane."""

STEP: Final = 0x9E3779B97F4A7C15
MULTIPLIERS: Final = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""The constants of SplitMix64."""


def _mix(values: Words) -> Words:
    """Hash counters to odd words (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    return (values ^ (values >> np.uint64(31))) | np.uint64(1)


def _generate_weights(seed: int, start: int, count: int) -> Words:
    counters = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    return _mix(counters * np.uint64(STEP) + np.uint64(seed))


@lru_cache
def word_weights(lane: int) -> Words:
    """Return T, the inner weights of lane 0 or 1: one for each word of a block."""
    return _generate_weights(SEEDS[lane][0], 0, BLOCK)


def block_weights(lane: int, start: int, count: int) -> Words:
    """Return S, the outer weights of lane 0 or 1, for `count` blocks from block `start`."""
    return _generate_weights(SEEDS[lane][1], start, count)


@lru_cache(4096)
def _block_weight(lane: int, block: int) -> int:
    return int(block_weights(lane, block, 1)[0])


def _shift_high(words: NDArray[Any]) -> Words:
    """Return the high halves of words, in this thread's scratch memory."""
    halves: Words = _SCRATCH.get_array(words.shape, np.uint64)
    np.right_shift(words, _HIGH, out=halves)
    return halves


@dataclass(slots=True)
class Digest:
    """Two running sums. `add` takes parts of the parameter in any order; `str` returns the form in manifests."""

    lane1: int = 0
    lane2: int = 0

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest that `str` wrote, so that more parts can be added."""
        return cls(int(text[:16], 16), int(text[16:], 16))

    def add(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Add bytes of the parameter.

        Args:
            offset: the offset of the first byte in the parameter's logical row-major bytes.
            data: the bytes, one-dimensional and contiguous.
        """
        lead = min(-offset % _WORD, len(data))
        if lead:
            self._add_bytes(offset, data[:lead])
            offset, data = offset + lead, data[lead:]
        whole = len(data) // _WORD * _WORD
        self._add_words(offset // _WORD, data[:whole])
        if whole < len(data):
            self._add_bytes(offset + whole, data[whole:])

    def add_rows(self, offset: int, rows: NDArray[Any], stride: int) -> bool:
        """Add rows of words at a fixed stride, if there are enough of them to be faster than adding each by itself.

        Rows that begin at the same position in their blocks are multiplied by the same weights.

        Args:
            offset: the offset of the first row in the parameter's bytes.
            rows: the rows, two-dimensional.
            stride: the bytes in the parameter from the beginning of one row to the beginning of the next.

        Returns:
            Whether the rows were added.
        """
        if len(rows) == 1:
            self.add(offset, np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
            return True
        step = stride // _WORD
        period = BLOCK // gcd(BLOCK, step)
        if rows.itemsize != _WORD or offset % _WORD or stride % _WORD or len(rows) < period * _MIN_ROWS_PER_CALL:
            return False
        index = offset // _WORD
        first = index // BLOCK
        last = (index + (len(rows) - 1) * step + rows.shape[1] - 1) // BLOCK
        outer = [block_weights(lane, first, last - first + 1) for lane in (0, 1)]
        for row in range(period):
            start = index + row * step - first * BLOCK
            self._add_aligned_rows(start, rows[row::period], period * step // BLOCK, outer)
        return True

    def join(self, other: Digest) -> None:
        """Add the digest of other parts."""
        self._accumulate(0, other.lane1)
        self._accumulate(1, other.lane2)

    def _add_aligned_rows(self, start: int, rows: NDArray[Any], blocks: int, outer: Sequence[Words]) -> None:
        """Add rows at a stride of whole blocks, `start` words after the block that `outer` begins with."""
        column = 0
        while column < rows.shape[1]:
            block, place = divmod(start + column, BLOCK)
            words = rows[:, column : column + BLOCK - place]
            for lane, values in ((0, words), (1, _shift_high(words))):
                inner = word_weights(lane)[place : place + words.shape[1]]
                sums = np.einsum("ij,j->i", values, inner)
                self._accumulate(lane, int(np.dot(sums, outer[lane][block::blocks][: len(rows)])))
            column += words.shape[1]

    def _add_bytes(self, offset: int, data: NDArray[np.uint8]) -> None:
        word = np.zeros(_WORD, np.uint8)
        place = offset % _WORD
        word[place : place + len(data)] = data
        self._add_words(offset // _WORD, word)

    def _add_words(self, index: int, data: NDArray[np.uint8]) -> None:
        words = data.view("<u8")
        block, place = divmod(index, BLOCK)
        head = min(-place % BLOCK, len(words))
        if head:
            self._add_block(block, place, words[:head])
            words, block = words[head:], block + 1
        blocks = len(words) // BLOCK
        self._add_blocks(block, words[: blocks * BLOCK].reshape(blocks, BLOCK))
        if len(words) > blocks * BLOCK:
            self._add_block(block + blocks, 0, words[blocks * BLOCK :])

    def _add_block(self, block: int, place: int, words: NDArray[Any]) -> None:
        for lane, values in ((0, words), (1, _shift_high(words))):
            partial = int(np.dot(word_weights(lane)[place : place + len(words)], values))
            self._accumulate(lane, partial * _block_weight(lane, block))

    def _add_blocks(self, block: int, rows: NDArray[Any]) -> None:
        sums = np.empty((2, len(rows)), np.uint64)
        # A batch stays in the processor's cache for the second lane.
        for first in range(0, len(rows), _BATCH):
            batch = rows[first : first + _BATCH]
            part = sums[:, first : first + _BATCH]
            np.einsum("ij,j->i", batch, word_weights(0), out=part[0])
            np.einsum("ij,j->i", _shift_high(batch), word_weights(1), out=part[1])
        for lane in (0, 1):
            self._accumulate(lane, int(np.dot(sums[lane], block_weights(lane, block, len(rows)))))

    def _accumulate(self, lane: int, value: int) -> None:
        if lane:
            self.lane2 = (self.lane2 + value) & _MASK
        else:
            self.lane1 = (self.lane1 + value) & _MASK

    def __str__(self) -> str:
        return f"{self.lane1:016x}{self.lane2:016x}"
