"""The parallel model's own forward, driven block by block, and the unsharded model's, replayed on what blocks gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from plans.errors import MigratorError, UsageError
from plans.text import first_line
from runtime.processes.agreement import all_gather_json, raise_on_any_rank
from runtime.validation.by_block.blocks import intercept_calls
from runtime.validation.by_block.boundary import list_tensors
from runtime.validation.by_block.comparison import (
    BlockComparison,
    BlockRows,
    Difference,
    FailedBlockError,
    Recorded,
    measure_difference,
)
from runtime.validation.by_block.routing import RoutingDifference
from runtime.validation.by_block.run import BlockCallArguments
from runtime.validation.gradients import RankRows, gather_rows

__all__ = ["CallRows", "drive_blocks"]


@dataclass(frozen=True)
class CallRows:
    """What one call of a block showed, on every rank.

    Args:
        block: the block's name; empty for what several blocks use and what lies between them.
        label: what was called, in words: the block's name, with the number of the call from the second on.
        outputs: the outputs by rank.
        inputs: the gradients of the inputs by rank.
        parameters: the gradients of the parameters by rank.
        routing: the routing by rank.
        forced: whether routing was forced for experts that no token had reached.
    """

    block: str
    label: str
    outputs: Sequence[Mapping[str, Difference]]
    inputs: Sequence[Mapping[str, Difference]]
    parameters: Sequence[RankRows]
    routing: Sequence[RoutingDifference]
    forced: bool


@dataclass
class _Drive:
    """Takes the calls of one forward."""

    comparison: BlockComparison
    rows: list[CallRows] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def take(self, block: str, run: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        output, rows = self.comparison.compare(block, run, args, kwargs)
        self.counts[block] = count = self.counts.get(block, 0) + 1
        label = block if count == 1 else f"{block} (call {count})"
        self.rows.append(_gather(block, label, rows))
        return output


def drive_blocks(
    comparison: BlockComparison, unsharded_blocks: Mapping[str, nn.Module], inputs: Mapping[str, Any]
) -> list[CallRows] | FailedBlockError:
    """Run the parallel model's forward with every block compared, then hold the unsharded model's against it.

    What lies between blocks runs twice: in the parallel model on what unsharded blocks returned, and, without any
    block, in the unsharded model. Both must call the same blocks with the same inputs and return the same.

    Args:
        comparison: compares the blocks.
        unsharded_blocks: the unsharded model's blocks.
        inputs: the model's arguments.

    Returns:
        What each call showed, or the failure of a parallel block.

    Raises:
        UsageError: the model cannot be run block by block.
    """
    drive = _Drive(comparison)
    comparison.recorded.clear()
    try:
        with torch.enable_grad(), intercept_calls(comparison.blocks, drive.take):
            output = comparison.model(**inputs)
    except (MigratorError, FailedBlockError) as error:
        if isinstance(error, FailedBlockError):
            return error
        raise
    except Exception as error:  # what lies between blocks may raise anything, and does so on all ranks alike
        reason = f"what lies between its blocks does not run without their weights: {first_line(error)}"
        raise _build_refusal(comparison.model, reason) from error
    wholes = [comparison.layouts.read(tensor)[1] for tensor in list_tensors(output)]
    own = raise_on_any_rank(lambda: _replay(comparison, unsharded_blocks, inputs, wholes))
    drive.rows.append(_gather("", "between the blocks", own))
    return drive.rows


def _replay(
    comparison: BlockComparison,
    unsharded_blocks: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    outputs: list[torch.Tensor],
) -> BlockRows:
    """Run the unsharded model's own forward with recorded outputs in the place of blocks, and compare."""
    rows = BlockRows()
    if not comparison.group.is_leader:
        return rows
    model = comparison.unsharded.model
    waiting = iter(comparison.recorded)

    def give(block: str, run: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        entry = next(waiting, None)
        if entry is None or entry.block != block:
            ran = f"{entry.block} at this point" if entry else "no block any more"
            raise _build_refusal(model, f"unsharded it runs {block}, where the parallel model runs {ran}")
        call = BlockCallArguments.read(args, kwargs, [])
        _compare_inputs(rows, model, entry, call)
        return entry.outputs.give(call, [tensor.clone() for tensor in entry.tensors])

    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(intercept_calls(unsharded_blocks, give))
            expected = list_tensors(model(**inputs))
    except MigratorError:
        raise
    except Exception as error:
        raise _build_refusal(model, first_line(error)) from error
    if (entry := next(waiting, None)) is not None:
        raise _build_refusal(model, f"the parallel model runs {entry.block} once more than the unsharded one")
    if len(expected) != len(outputs):
        raise _build_refusal(
            model, f"it returns {len(outputs)} tensors, {len(expected)} of which come from what blocks return"
        )
    for number, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
        rows.outputs[f"output {number} of the model"] = measure_difference(found.detach(), wanted, wanted)
    return rows


def _compare_inputs(rows: BlockRows, model: nn.Module, entry: Recorded, call: BlockCallArguments) -> None:
    if len(call.tensors) != len(entry.inputs):
        raise _build_refusal(
            model,
            f"{entry.block} takes {len(entry.inputs)} tensors in the parallel model, {len(call.tensors)} unsharded",
        )
    for name, found, wanted in zip(call.names, entry.inputs, call.tensors, strict=True):
        difference = measure_difference(found, wanted.detach(), wanted.detach())
        label = f"what {entry.block} takes as {name}"
        if label not in rows.outputs or difference.error > rows.outputs[label].error:
            rows.outputs[label] = difference


def _build_refusal(model: nn.Module, reason: str) -> UsageError:
    return UsageError(
        f"{type(model).__name__} cannot be validated block by block: {reason}",
        hint="validate it whole, on a machine with more memory",
        model=type(model).__name__,
    )


def _gather(block: str, label: str, rows: BlockRows) -> CallRows:
    """Collect what a call showed from all ranks. Collective."""
    gathered: list[Any] = all_gather_json(
        [
            {name: [one.error, one.scale] for name, one in rows.outputs.items()},
            {name: [one.error, one.scale] for name, one in rows.inputs.items()},
            [rows.routing.wrong, rows.routing.tied],
        ]
    )
    parts = [[{name: Difference(*pair) for name, pair in row[part].items()} for row in gathered] for part in (0, 1)]
    routing = [RoutingDifference(*row[2]) for row in gathered]
    return CallRows(block, label, parts[0], parts[1], gather_rows(rows.parameters), routing, rows.forced)
