"""The digest of a tensor on its own device: the same sums as `runtime.checkpoint.digest`, in torch's wrapping integers.

A GPU digests its local shards without copying them to the host, in one kernel where there is Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from threading import Lock, get_ident
from typing import Final

import torch

from runtime.checkpoint.copying.strided import get_contiguous_size, split_row_groups
from runtime.checkpoint.digest import BLOCK, MULTIPLIERS, SEEDS, STEP, Digest
from runtime.checkpoint.verifying.fused_sums import SumRange, find_fused_sums
from runtime.tensor_map.strided_copy import Stride, StridedCopy

__all__ = ["DeviceSums", "digest_tensor"]

_WORD: Final = 8
_BATCH: Final = 2**22
"""Words digested at a time, which bounds the device memory that their weights take."""


def digest_tensor(tensor: torch.Tensor, offset: int = 0, stride: int | None = None) -> Digest:
    """Return the digest of a tensor that is a part of a parameter.

    Args:
        tensor: the tensor, on any device. Without a stride, its bytes are contiguous in the parameter; with one, the
            bytes of each slice along dim 0 are.
        offset: the offset of its first byte in the parameter's logical row-major bytes.
        stride: the bytes in the parameter from the beginning of one slice to the beginning of the next.
    """
    if not tensor.numel():
        return Digest()
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    rows = 1 if stride is None else len(tensor)
    width = len(content) // rows
    strides = (Stride(rows, width, stride),) if stride is not None and rows > 1 else ()
    sums = DeviceSums(1, content.device)
    sums.add([SumRange(content, StridedCopy(0, 0, 0, offset, width, strides))])
    return sums.read()[0]


class DeviceSums:
    """Running sums over the bytes of several parameters on one device, from any threads and streams at once."""

    def __init__(self, count: int, device: torch.device) -> None:
        """Begin with sums of zero.

        Args:
            count: the number of parameters.
            device: the device.
        """
        self._count, self._device = count, device
        self._fused = find_fused_sums(device)
        self._lock = Lock()
        # Streams may not add to one tensor at once, except within the kernel, which adds atomically.
        self._totals: dict[int, torch.Tensor] = {}
        if self._fused is not None:
            self._totals[0] = self._make_totals()

    @property
    def can_write(self) -> bool:
        """Whether bytes are also written to their places while their sums are taken."""
        return self._fused is not None

    def add(self, ranges: Sequence[SumRange]) -> None:
        """Add ranges of bytes to their parameters' sums, without waiting for the device.

        Args:
            ranges: the ranges, on this device; those with a place are written to it, if the sums can write.
        """
        if self._fused is not None:
            self._fused(ranges, self._totals[0])
            return
        with self._lock:
            totals = self._totals.setdefault(get_ident(), self._make_totals())
        for content, copy, place in ranges:
            assert place is None, "only the kernel writes"
            _add_range(totals[copy.destination], content, copy)

    def read(self) -> list[Digest]:
        """Wait for the device, and return the digest of each parameter. Other streams must be done."""
        # One transfer at the end lets the device work without waiting for the host.
        total = sum(self._totals.values(), self._make_totals())
        return [Digest(*(lane % 2**64 for lane in lanes)) for lanes in total.tolist()]

    def _make_totals(self) -> torch.Tensor:
        return torch.zeros(self._count, 2, dtype=torch.int64, device=self._device)


def _add_range(total: torch.Tensor, content: torch.Tensor, copy: StridedCopy) -> None:
    for group in split_row_groups(copy):
        sizes = (*(stride.steps for stride in group.strides), group.length)
        strides = (*(stride.source_stride for stride in group.strides), 1)
        view = content.as_strided(sizes, strides, content.storage_offset() + group.source_offset)
        width = get_contiguous_size(group)
        rows = view.reshape(-1, width)
        _add_bytes(total, rows, group.destination_offset, group.strides[0].destination_stride if len(rows) > 1 else 0)


def _add_bytes(total: torch.Tensor, rows: torch.Tensor, offset: int, stride: int) -> None:
    """Add rows of bytes; the first begins at byte `offset`, each other one `stride` bytes after the one before."""
    stride = stride or _WORD
    # Rows that begin at the same byte of a word are padded alike.
    period = _WORD // gcd(_WORD, stride)
    for row in range(min(period, len(rows))):
        aligned, start = rows[row::period], offset + row * stride
        lead = start % _WORD
        _add_rows(total, _pad_to_words(aligned, lead), (start - lead) // _WORD, stride * period // _WORD)


def _pad_to_words(rows: torch.Tensor, lead: int) -> torch.Tensor:
    """Return rows of bytes as words, padded with zeros if they begin or end within a word."""
    tail = -(lead + rows.shape[1]) % _WORD
    padded = torch.nn.functional.pad(rows, (lead, tail)) if lead or tail else rows.contiguous()
    # A view of a larger tensor may begin within a word of its storage.
    return (padded.clone() if padded.storage_offset() % _WORD else padded).view(torch.int64)


def _add_rows(total: torch.Tensor, words: torch.Tensor, index: int, step: int) -> None:
    """Add rows of words; the first begins at word `index`, each other one `step` words after the one before."""
    width = words.shape[1]
    # Whole blocks are cheaper to add, but only if all rows begin at the same word of a block.
    has_same_start = len(words) == 1 or step % BLOCK == 0
    head = min(-index % BLOCK, width) if has_same_start else width
    tail = width - (width - head) % BLOCK
    for first, last, add in ((0, head, _add_words), (head, tail, _add_blocks), (tail, width, _add_words)):
        if first < last:
            add(total, words[:, first:last], index + first, step)


def _add_blocks(total: torch.Tensor, words: torch.Tensor, index: int, step: int) -> None:
    """Add rows of whole blocks that begin at the beginning of a block."""
    inner = [_generate_weights(SEEDS[lane][0], torch.arange(BLOCK, device=words.device)) for lane in (0, 1)]
    for part, start in _split_batches(words, index, step):
        blocks = part.view(len(part), -1, BLOCK)
        numbers = _compute_indices(blocks, start // BLOCK, step // BLOCK)
        for lane, values in enumerate(_split_lanes(blocks)):
            total[lane] += ((values * inner[lane]).sum(-1) * _generate_weights(SEEDS[lane][1], numbers)).sum()


def _add_words(total: torch.Tensor, words: torch.Tensor, index: int, step: int) -> None:
    """Add rows that may begin and end anywhere in a block."""
    for part, start in _split_batches(words, index, step):
        numbers = _compute_indices(part, start, step)
        for lane, values in enumerate(_split_lanes(part)):
            inner, outer = SEEDS[lane]
            total[lane] += (
                _generate_weights(inner, numbers % BLOCK) * _generate_weights(outer, numbers // BLOCK) * values
            ).sum()


def _split_batches(words: torch.Tensor, index: int, step: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield parts of the rows of at most `_BATCH` words, each with the index of its first word."""
    height = max(1, _BATCH // words.shape[1])
    for top in range(0, len(words), height):
        for left in range(0, words.shape[1], _BATCH):
            yield words[top : top + height, left : left + _BATCH], index + top * step + left


def _compute_indices(rows: torch.Tensor, start: int, step: int) -> torch.Tensor:
    """Return the index of each entry along the first two dims."""
    down = torch.arange(rows.shape[0], device=rows.device)[:, None] * step
    return start + down + torch.arange(rows.shape[1], device=rows.device)


def _split_lanes(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return words, (words >> 32) & 0xFFFFFFFF


def _generate_weights(seed: int, index: torch.Tensor) -> torch.Tensor:
    first, second = MULTIPLIERS
    values: torch.Tensor = (index + 1) * _to_signed(STEP) + _to_signed(seed)
    values = (values ^ _shift_right(values, 30)) * _to_signed(first)
    values = (values ^ _shift_right(values, 27)) * _to_signed(second)
    values = (values ^ _shift_right(values, 31)) | 1
    return values


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without sign extension, which torch's signed integers would do."""
    shifted: torch.Tensor = (values >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _to_signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
