"""The digest of tensors where they are, on any device: the same sums as `digest`, in torch's wrapping integers."""

from __future__ import annotations

from math import gcd
from typing import Final

import torch

from runtime.checkpoint.verifying.digest import BLOCK, MULTIPLIERS, SEEDS, STEP, Digest

__all__ = ["tensor_digest"]

_WORD: Final = 8
_BATCH: Final = 2**22
"""Words at a time: what the weights of more would take is memory of the device."""


def tensor_digest(tensor: torch.Tensor, offset: int = 0, stride: int | None = None) -> Digest:
    """Return the sums of a tensor's bytes, or of its rows where they lie apart in the parameter.

    Args:
        tensor: a piece of the parameter, on any device. Without a stride its bytes follow one another; with one, those
            of each slice along dim 0 do.
        offset: of the first byte in the parameter's logical row-major bytes.
        stride: bytes from the beginning of one slice to that of the next, in the parameter.
    """
    sums = Digest()
    if not tensor.numel():
        return sums
    rows = tensor.detach().contiguous()
    rows = rows.reshape(1, -1) if stride is None else rows.reshape(len(rows), -1)
    rows, stride = rows.view(torch.uint8), stride or _WORD
    # Rows that begin at the same place of a word are padded alike.
    period = _WORD // gcd(_WORD, stride)
    for row in range(min(period, len(rows))):
        alike, start = rows[row::period], offset + row * stride
        lead = start % _WORD
        _add(sums, _words(alike, lead), (start - lead) // _WORD, stride * period // _WORD)
    return sums


def _words(rows: torch.Tensor, lead: int) -> torch.Tensor:
    """Return rows of bytes as words, zeros before and behind where they begin or end within one."""
    behind = -(lead + rows.shape[1]) % _WORD
    padded = torch.nn.functional.pad(rows, (lead, behind)) if lead or behind else rows.contiguous()
    return padded.view(torch.int64)


def _add(sums: Digest, words: torch.Tensor, index: int, step: int) -> None:
    """Add rows of words, the first of them at word `index`, each row `step` words behind the one before."""
    height = max(1, _BATCH // words.shape[1])
    for top in range(0, len(words), height):
        for left in range(0, words.shape[1], _BATCH):
            part = words[top : top + height, left : left + _BATCH]
            rows = torch.arange(len(part), device=part.device)[:, None] * step
            places = index + top * step + left + rows + torch.arange(part.shape[1], device=part.device)
            halves = (part >> 32) & 0xFFFFFFFF
            lanes = [int((_weights(lane, places) * values).sum()) for lane, values in ((0, part), (1, halves))]
            sums.join(Digest(*lanes))


def _weights(lane: int, places: torch.Tensor) -> torch.Tensor:
    return _sequence(SEEDS[lane][0], places % BLOCK) * _sequence(SEEDS[lane][1], places // BLOCK)


def _sequence(seed: int, index: torch.Tensor) -> torch.Tensor:
    first, second = MULTIPLIERS
    values: torch.Tensor = (index + 1) * _signed(STEP) + _signed(seed)
    values = (values ^ _shifted(values, 30)) * _signed(first)
    values = (values ^ _shifted(values, 27)) * _signed(second)
    values = (values ^ _shifted(values, 31)) | 1
    return values


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without a sign, which torch's integers have."""
    shifted: torch.Tensor = (values >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
