"""The sums of digests as one Triton kernel: it reads each word of many strided ranges once, wherever they are.

The same kernel writes the words to where they belong, so that a load needs no other for bytes that lie scattered.

Importing this module needs Triton, which torch's builds for GPUs bring; `device_sums` does without it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.checkpoint.digest import BLOCK, MULTIPLIERS, SEEDS, STEP

__all__ = ["FIELDS", "MAX_DIMS", "launch_sums"]

MAX_DIMS = 3
"""How many strides a range may have."""

FIELDS = 6 + 4 * MAX_DIMS
"""Numbers that describe a range: its address, the address to write it to or zero, its offset in the parameter, its
sum's number, its units in all, those that are contiguous; then of each stride, innermost first: steps, stride in
memory, stride in the memory that is written, stride in the parameter.
"""

# The kernel's arguments have no types: Triton before 3.7 takes a type's name for a variable that it cannot read.
_TILE = 2048
_PROGRAMS = 128
"""Programs for each range; those that a small range has no use for end at once."""

_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
_STEP: tl.constexpr = tl.constexpr(STEP)
_FIRST: tl.constexpr = tl.constexpr(MULTIPLIERS[0])
_SECOND: tl.constexpr = tl.constexpr(MULTIPLIERS[1])
_SEED_1: tl.constexpr = tl.constexpr(SEEDS[0][1])
_SEED_2: tl.constexpr = tl.constexpr(SEEDS[1][1])
_FIELDS: tl.constexpr = tl.constexpr(FIELDS)


@triton.jit
def _mix(values):
    values = (values ^ (values >> 30)) * _FIRST
    values = (values ^ (values >> 27)) * _SECOND
    return (values ^ (values >> 31)) | 1


@triton.jit
def _sum_ranges(ranges, inner_weights, totals, UNIT: tl.constexpr, DIMS: tl.constexpr, TILE: tl.constexpr):
    row = ranges + tl.program_id(0) * _FIELDS
    address = tl.load(row)
    target_address = tl.load(row + 1)
    offset = tl.load(row + 2)
    slot = tl.load(row + 3)
    count = tl.load(row + 4).to(tl.int32)
    width = tl.load(row + 5).to(tl.int32)
    if UNIT == 8:
        memory = address.to(tl.pointer_type(tl.uint64))
        target = target_address.to(tl.pointer_type(tl.uint64))
    elif UNIT == 4:
        memory = address.to(tl.pointer_type(tl.uint32))
        target = target_address.to(tl.pointer_type(tl.uint32))
    elif UNIT == 2:
        memory = address.to(tl.pointer_type(tl.uint16))
        target = target_address.to(tl.pointer_type(tl.uint16))
    else:
        memory = address.to(tl.pointer_type(tl.uint8))
        target = target_address.to(tl.pointer_type(tl.uint8))
    lane1 = tl.zeros((TILE,), tl.uint64)
    lane2 = tl.zeros((TILE,), tl.uint64)
    for first in range(tl.program_id(1) * TILE, count, tl.num_programs(1) * TILE):
        index = first + tl.arange(0, TILE)
        is_inside = index < count
        if DIMS == 0:
            source = index.to(tl.int64)
            written = source
            place = offset + source * UNIT
        else:
            rest = index // width
            source = (index - rest * width).to(tl.int64)
            written = source
            place = offset + source * UNIT
            for dim in tl.static_range(DIMS):
                steps = tl.load(row + 6 + 4 * dim).to(tl.int32)
                outer = rest // steps
                step = (rest - outer * steps).to(tl.int64)
                source += step * tl.load(row + 7 + 4 * dim)
                written += step * tl.load(row + 8 + 4 * dim)
                place += step * tl.load(row + 9 + 4 * dim)
                rest = outer
        units = tl.load(memory + source, mask=is_inside, other=0)
        tl.store(target + written, units, mask=is_inside & (target_address != 0))
        words = units.to(tl.uint64)
        if UNIT < 8:
            words = words << ((place & 7) * 8).to(tl.uint64)
        number = place >> 3
        inner = number & (_BLOCK - 1)
        block = ((number // _BLOCK) + 1).to(tl.uint64) * _STEP
        weight1 = tl.load(inner_weights + inner).to(tl.uint64, bitcast=True) * _mix(block + _SEED_1)
        weight2 = tl.load(inner_weights + _BLOCK + inner).to(tl.uint64, bitcast=True) * _mix(block + _SEED_2)
        lane1 += words * weight1
        lane2 += (words >> 32) * weight2
    total1 = tl.sum(lane1, 0).to(tl.int64, bitcast=True)
    total2 = tl.sum(lane2, 0).to(tl.int64, bitcast=True)
    if tl.program_id(1) * TILE < count:
        tl.atomic_add(totals + 2 * slot, total1, sem="relaxed")
        tl.atomic_add(totals + 2 * slot + 1, total2, sem="relaxed")


def launch_sums(
    ranges: torch.Tensor, inner_weights: torch.Tensor, totals: torch.Tensor, unit: int, dims: int, most: int
) -> None:
    """Start the kernel on the current stream.

    Args:
        ranges: a row of `FIELDS` numbers for each range, on the device.
        inner_weights: the inner weights of both lanes, on the device.
        totals: the two sums of each number, to which the ranges' are added.
        unit: the bytes of a unit, 1, 2, 4 or 8; addresses, offsets and strides are multiples of it.
        dims: the largest number of strides of a range.
        most: the units of the largest range.
    """
    programs = min(_PROGRAMS, triton.cdiv(most, _TILE))
    _sum_ranges[(len(ranges), programs)](ranges, inner_weights, totals, unit, dims, _TILE, num_warps=8)
