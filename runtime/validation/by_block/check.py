"""The parts of a validation that goes block by block: content, forward and backward of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from plans.resolved_plan import ResolvedPlan
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.open import open_checkpoint
from runtime.models.model import meta_model
from runtime.parallel.fsdp import apply_fsdp
from runtime.parallel.mesh import DeviceMeshes, device_meshes
from runtime.parallel.parallelize import apply_plan
from runtime.processes.agreement import all_gather_json, raise_on_any_rank
from runtime.processes.sharing import SharingGroup, share_object
from runtime.styles import StyleRegistry
from runtime.validation.by_block.blocks import find_blocks
from runtime.validation.by_block.boundary import Layouts
from runtime.validation.by_block.comparison import BlockComparison, FailedBlockError
from runtime.validation.by_block.drive import CallRows, drive_blocks
from runtime.validation.by_block.evaluation import evaluate_backward, evaluate_forward, merge_exercised
from runtime.validation.by_block.unsharded import UnshardedBlocks
from runtime.validation.by_block.weights import BlockWeights, prepare_weights
from runtime.validation.content import compare_digests, compute_shard_digest
from runtime.validation.exercise import find_unexercised
from runtime.validation.gradients import GradientRow, RankRows, gather_rows, is_exercised
from runtime.validation.inputs import count_batches, find_batch, place_inputs, sample_batches
from runtime.validation.local import free_memory
from runtime.validation.model import check_loaded_bytes
from runtime.validation.precision import Precision
from runtime.validation.reference import read_config_with_dtype
from runtime.validation.reference_comparison import compare_tensors
from runtime.validation.request import ValidationRequest
from runtime.validation.results import PartFailure, ResultBuilder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_by_block"]

_MOST_INPUTS = 4
"""How many inputs are tried, each longer than the one before, until every parameter and every expert has a gradient."""
READING = "migrator alone, because it is read block by block"


def check_by_block(
    request: ValidationRequest,
    styles: StyleRegistry,
    checkpoint: Checkpoint,
    resolved: ResolvedPlan,
    precision: Precision,
    builder: ResultBuilder,
) -> None:
    """Compare a checkpoint's model with the unsharded one, block by block, and add the results. Collective.

    Args:
        request: what to validate.
        styles: the styles that plans may use.
        checkpoint: the checkpoint.
        resolved: the plan, whose structure was checked.
        precision: the precision that both compute in.
        builder: collects the results.

    Raises:
        MigratorError: the model cannot be validated so, or the work could not be done.
    """
    run = _Run(request, checkpoint, resolved, precision, builder.device)
    with builder.time_phase("loading"):
        comparison = run.prepare(styles)
    with builder.time_phase("blocks"), precision.computing():
        rows = run.drive(comparison)
        run.look_at_the_rest(comparison)
    structure = check_loaded_bytes(run.bytes, resolved, checkpoint)
    before = builder.checks["structure"]
    builder.add("structure", replace(structure, mismatches=(*before.mismatches, *structure.mismatches)))
    with builder.time_phase("content"):
        content = compare_digests(run.digests, resolved, checkpoint)
        if request.reference is not None:
            content = compare_tensors(content, checkpoint, request.reference)
        builder.add("content", content)
    if isinstance(rows, FailedBlockError):
        builder.add("forward", PartFailure(str(rows)))
        builder.skip("the forward failed", "backward")
    else:
        run.evaluate(comparison, rows, builder)
    builder.skip("the model was compared block by block", "generation", "forward as stored")


@dataclass
class _Run:
    """One validation.

    Args:
        request: what to validate.
        checkpoint: the checkpoint.
        resolved: the plan.
        precision: the precision that both compute in.
        device: the device of this rank.
        bytes: the bytes of this rank's tensors as they are stored, so far.
        digests: the digests of this rank's shards, so far.
        inputs: the number of inputs that were run.
    """

    request: ValidationRequest
    checkpoint: Checkpoint
    resolved: ResolvedPlan
    precision: Precision
    device: torch.device
    bytes: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    inputs: int = 0

    def prepare(self, styles: StyleRegistry) -> BlockComparison:
        """Build both models on meta, with all that brings their blocks in. Collective."""
        request, mesh = self.request, self.resolved.mesh
        meshes = device_meshes(mesh, self.device.type)
        model = raise_on_any_rank(lambda: meta_model(read_config_with_dtype(request.folder, self.precision.dtype)))
        apply_plan(model, meshes, self.resolved, styles)
        blocks = raise_on_any_rank(lambda: find_blocks(model))
        weights = raise_on_any_rank(lambda: self._prepare_parallel(model, blocks, meshes))
        size = max(mesh.tp, mesh.ep)
        groups = [SharingGroup(range(first, first + size)) for first in range(0, mesh.world_size, size)]
        comparison = BlockComparison(
            model,
            blocks,
            weights,
            share_object(self._prepare_unsharded),
            groups[find_batch(mesh, dist.get_rank())],
            self.resolved,
            self.precision,
            request.seed,
            self.precision.tolerance(request.tolerance),
            Layouts(meshes.axes.get("tp")),
            self._look,
        )
        raise_on_any_rank(lambda: weights.bring(None, self._look))
        return comparison

    def _prepare_parallel(
        self, model: PreTrainedModel, blocks: dict[str, nn.Module], meshes: DeviceMeshes
    ) -> BlockWeights:
        return prepare_weights(
            model,
            blocks,
            self.checkpoint,
            self.precision.dtype,
            self.device,
            lambda: apply_fsdp(model, self.resolved, meshes, list(blocks.values())),
        )

    def _prepare_unsharded(self) -> UnshardedBlocks:
        folder = self.request.reference or self.request.folder
        model = meta_model(read_config_with_dtype(folder, self.precision.dtype))
        checkpoint = open_checkpoint(folder).read_headers() if self.request.reference else self.checkpoint
        blocks = find_blocks(model)
        weights = prepare_weights(model, blocks, checkpoint, self.precision.dtype, self.device)
        weights.bring(None)
        return UnshardedBlocks(model, blocks, weights)

    def _look(self, name: str, stored: torch.Tensor) -> None:
        self.bytes += stored.nbytes
        self.digests[name] = compute_shard_digest(stored, self.resolved.by_name[name], self.resolved.mesh)

    def drive(self, comparison: BlockComparison) -> list[CallRows] | FailedBlockError:
        """Run inputs until one brings nothing new, and return what their calls showed. Collective."""
        rows: list[CallRows] = []
        reached, own = -1, find_batch(self.resolved.mesh, dist.get_rank())
        for number in range(_MOST_INPUTS):
            batch = sample_batches(comparison.model, self.request, number)[own]
            comparison.shared.clear()
            inputs = place_inputs(batch.inputs, self.device, self.precision.dtype)
            found = drive_blocks(comparison, comparison.unsharded.blocks, inputs)
            if isinstance(found, FailedBlockError):
                return found
            self.inputs += 1
            rows += found
            rows += [_gather_shared(comparison)] if comparison.shared else []
            exercised = merge_exercised(rows)
            before, reached = (
                reached,
                sum((row.exercised is True) - len(row.idle) for one in exercised for row in one.values()),
            )
            if is_exercised(exercised, comparison.unsharded.read) or reached == before:
                break
        return rows

    def look_at_the_rest(self, comparison: BlockComparison) -> None:
        """Read the blocks that never ran, for their content. Collective."""
        weights = comparison.weights
        for block, module in comparison.blocks.items():
            if any(one.stored not in weights.looked_at for one in weights.by_block[block]):
                raise_on_any_rank(partial(weights.bring, block, self._look))
                weights.drop(block, module)
        free_memory(self.device)

    def evaluate(self, comparison: BlockComparison, rows: Sequence[CallRows], builder: ResultBuilder) -> None:
        """Add the results of forward and backward, and what was not exercised. Collective."""
        facts: dict[str, Any] = {
            "precision": self.precision.name,
            "against": "the unsharded blocks",
            "reference_read_by": READING,
            "batches": count_batches(self.resolved.mesh),
        }
        builder.add("forward", evaluate_forward(rows, comparison.tolerance, facts))
        exercised = self._list_exercised(comparison, rows)
        unexercised = find_unexercised(
            [{name: row.exercised for name, row in by_name.items()} for by_name in exercised],
            {name: row.idle for name, row in exercised[0].items()},
            comparison.unsharded.read | set(all_gather_json(sorted(comparison.unsharded.read))[0]),
        )
        numbers = {
            **self.precision.describe_gradients(self.request.tolerance),
            "batches": count_batches(self.resolved.mesh),
            "inputs": self.inputs,
            "forced_routing": any(row.forced for row in rows),
            "exercised": len(exercised[0]) - len(unexercised),
        }
        builder.add("backward", evaluate_backward(rows, numbers))
        builder.unexercised.extend(unexercised)

    def _list_exercised(self, comparison: BlockComparison, rows: Sequence[CallRows]) -> list[RankRows]:
        """Return what was exercised on every rank, parameters of blocks that never ran included. Collective."""
        merged = merge_exercised(rows)
        own = {
            one.stored: GradientRow(0.0, 0.0, False if one.ref.get_local().numel() else None)
            for placed in comparison.weights.by_block.values()
            for one in placed
            if isinstance(one.ref.tensor, nn.Parameter) and one.stored not in merged[0]
        }
        return [{**found, **never} for found, never in zip(merged, gather_rows(own), strict=True)]


def _gather_shared(comparison: BlockComparison) -> CallRows:
    """Return the gradients of parameters that several blocks use, which are compared when all of these have run."""
    rows = {}
    for name, (found, wanted) in comparison.shared.items():
        error = float((found - wanted).abs().max()) if wanted.numel() else 0.0
        value = float(wanted.abs().max()) if wanted.numel() else 0.0
        rows[name] = GradientRow(error, value, bool(wanted.any()) if wanted.numel() else None)
    by_rank = gather_rows(rows)
    largest = {name: max(row[name].value for row in by_rank) for name in rows}
    same = [{name: replace(row, value=largest[name]) for name, row in own.items()} for own in by_rank]
    return CallRows("", "what several blocks use", [{} for _ in same], [{} for _ in same], same, [], False)
