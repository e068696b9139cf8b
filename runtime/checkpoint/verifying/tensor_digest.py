"""The digest of tensors where they are, on any device: the same sums as `digest`, in torch's wrapping integers."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Final

import torch

from runtime.checkpoint.digest import BLOCK, MULTIPLIERS, SEEDS, STEP, Digest

__all__ = ["digest_tensor"]

_WORD: Final = 8
_BATCH: Final = 2**22
"""Words at a time: what the weights of more would take is memory of the device."""


def digest_tensor(tensor: torch.Tensor, offset: int = 0, stride: int | None = None) -> Digest:
    """Return the sums of a tensor's bytes, or of its rows where they lie apart in the parameter.

    Args:
        tensor: a piece of the parameter, on any device. Without a stride its bytes follow one another; with one, those
            of each slice along dim 0 do.
        offset: of the first byte in the parameter's logical row-major bytes.
        stride: bytes from the beginning of one slice to that of the next, in the parameter.
    """
    if not tensor.numel():
        return Digest()
    rows = tensor.detach().contiguous()
    rows = rows.reshape(1, -1) if stride is None else rows.reshape(len(rows), -1)
    rows, stride = rows.view(torch.uint8), stride or _WORD
    total = torch.zeros(2, dtype=torch.int64, device=rows.device)
    # Rows that begin at the same place of a word are padded alike.
    period = _WORD // gcd(_WORD, stride)
    for row in range(min(period, len(rows))):
        alike, start = rows[row::period], offset + row * stride
        lead = start % _WORD
        _add_rows(total, _pad_to_words(alike, lead), (start - lead) // _WORD, stride * period // _WORD)
    # The device is asked once, for it works on while the next sums are on their way to it.
    return Digest(*(lane % 2**64 for lane in total.tolist()))


def _pad_to_words(rows: torch.Tensor, lead: int) -> torch.Tensor:
    """Return rows of bytes as words, zeros before and behind where they begin or end within one."""
    behind = -(lead + rows.shape[1]) % _WORD
    padded = torch.nn.functional.pad(rows, (lead, behind)) if lead or behind else rows.contiguous()
    # A piece of a larger tensor may begin in memory where no word does.
    return (padded.clone() if padded.storage_offset() % _WORD else padded).view(torch.int64)


def _add_rows(total: torch.Tensor, words: torch.Tensor, index: int, step: int) -> None:
    """Add rows of words, the first of them at word `index`, each row `step` words behind the one before."""
    width = words.shape[1]
    # Whole blocks have a weight each that words of the same place share; rows meet blocks alike or not at all.
    is_alike = len(words) == 1 or step % BLOCK == 0
    head = min(-index % BLOCK, width) if is_alike else width
    tail = width - (width - head) % BLOCK
    for first, last, added in ((0, head, _add_words), (head, tail, _add_blocks), (tail, width, _add_words)):
        if first < last:
            added(total, words[:, first:last], index + first, step)


def _add_blocks(total: torch.Tensor, words: torch.Tensor, index: int, step: int) -> None:
    """Add rows of whole blocks, which begin where blocks do."""
    inner = [_generate_weights(SEEDS[lane][0], torch.arange(BLOCK, device=words.device)) for lane in (0, 1)]
    for part, start in _split_batches(words, index, step):
        blocks = part.view(len(part), -1, BLOCK)
        places = _compute_indices(blocks, start // BLOCK, step // BLOCK)
        for lane, values in enumerate(_split_lanes(blocks)):
            total[lane] += ((values * inner[lane]).sum(-1) * _generate_weights(SEEDS[lane][1], places)).sum()


def _add_words(total: torch.Tensor, words: torch.Tensor, index: int, step: int) -> None:
    """Add rows that begin and end anywhere."""
    for part, start in _split_batches(words, index, step):
        places = _compute_indices(part, start, step)
        for lane, values in enumerate(_split_lanes(part)):
            inner, outer = SEEDS[lane]
            total[lane] += (
                _generate_weights(inner, places % BLOCK) * _generate_weights(outer, places // BLOCK) * values
            ).sum()


def _split_batches(words: torch.Tensor, index: int, step: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield parts of rows that are small enough to work on, and the place of the first word of each."""
    height = max(1, _BATCH // words.shape[1])
    for top in range(0, len(words), height):
        for left in range(0, words.shape[1], _BATCH):
            yield words[top : top + height, left : left + _BATCH], index + top * step + left


def _compute_indices(rows: torch.Tensor, start: int, step: int) -> torch.Tensor:
    """Return the place of each entry along the first two dims."""
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
    """Shift right without a sign, which torch's integers have."""
    shifted: torch.Tensor = (values >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _to_signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
