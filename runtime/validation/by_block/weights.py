"""The weights of a model's blocks, in memory only while a block runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from plans.errors import UsageError
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.loader.non_persistent import rebuild_non_persistent, set_buffers
from runtime.loader.parameter_refs import ModuleEntry, ParameterRef, find_module_entries
from runtime.loader.sources import LoadSource, find_source
from runtime.loader.transfer import default_threads, transfer
from runtime.models.dtypes import DTYPES
from runtime.models.model import find_tied_names, model_tensors
from runtime.validation.by_block.blocks import find_block_of, separate_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BlockWeights", "Placed", "prepare_weights"]

Look = Callable[[str, torch.Tensor], None]
"""Looks at a tensor that was just read: its name in the checkpoint, and this rank's part of it as it is stored."""


@dataclass
class Placed:
    """A tensor of a block.

    Args:
        name: its name in the model.
        stored: the name by which checkpoints store it, another one if it is tied.
        ref: the tensor on meta, and the places in modules that refer to it.
        current: the tensor with memory, once it had some.
        size: the bytes of that memory while it is dropped; FSDP may have padded it.
    """

    name: str
    stored: str
    ref: ParameterRef
    current: torch.Tensor | None = None
    size: int = 0


@dataclass(frozen=True)
class BlockWeights:
    """What brings the weights of blocks in and drops them.

    While a block is dropped, its modules hold placeholders on meta, so that nothing can be computed with them. A
    parameter that was loaded once stays the same object, whose memory comes and goes, because FSDP keeps hold of it.

    Args:
        by_block: the tensors of each block; those of None lie outside of all blocks and stay in memory.
        source: where their bytes are.
        dtype: the dtype that floating-point tensors are cast to.
        device: the device of this rank.
        looked_at: the names in the checkpoint of the tensors that were looked at.
    """

    by_block: Mapping[str | None, list[Placed]]
    source: LoadSource
    dtype: torch.dtype
    device: torch.device
    looked_at: set[str] = field(default_factory=set)

    @cached_property
    def shared_names(self) -> frozenset[str]:
        """The names, as checkpoints have them, of tensors that several blocks hold."""
        counts = Counter(one.stored for placed in self.by_block.values() for one in placed)
        return frozenset(name for name, count in counts.items() if count > 1)

    def bring(self, block: str | None, look: Look | None = None) -> None:
        """Read a block's weights into the model.

        Args:
            block: the block's name, None for what lies outside of all blocks.
            look: looks at each tensor as it is stored, the first time that it is read.

        Raises:
            MigratorError: the checkpoint cannot be read, or the memory does not suffice.
        """
        try:
            # Modes that widen dtypes are meant for what models compute.
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._read(self.by_block.get(block, []), look)
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"{self.device} has too little memory for {block or 'the buffers'} of the model",
                hint="use more ranks, or a machine with more memory",
                block=block,
            ) from error

    def _read(self, placed: Sequence[Placed], look: Look | None) -> None:
        locals_ = {one.stored: self._allocate(one) for one in placed}
        new = {name: locals_.pop(name) for name in list(locals_) if look is not None and name not in self.looked_at}
        if new and look is not None:
            self._look(new, look)
        if locals_:
            transfer(self.source, locals_, list(locals_), default_threads())

    def drop(self, block: str, module: nn.Module) -> None:
        """Free the memory of a block's weights and gradients."""
        for inner in module.modules():
            if isinstance(inner, FSDPModule):
                inner.reshard()
        for one in self.by_block.get(block, []):
            assert one.current is not None
            one.current.grad = None
            storage = _get_local(one.current).untyped_storage()
            one.size = storage.size()
            storage.resize_(0)
            _install(one.ref.entries, one.ref.tensor)

    def _allocate(self, one: Placed) -> torch.Tensor:
        """Give a tensor its memory, and return this rank's part of it."""
        if one.current is None:
            stored = DTYPES[self.source.dtypes[one.stored]]
            dtype = self.dtype if stored.is_floating_point and stored.itemsize > 1 else stored
            one.ref.replace(torch.empty(one.ref.get_local().shape, dtype=dtype, device=self.device))
            tensors, name = one.ref.entries[0]
            one.current = tensors[name]
        else:
            _install(one.ref.entries, one.current)
            _get_local(one.current).untyped_storage().resize_(one.size)
        return _get_local(one.current)

    def _look(self, locals_: Mapping[str, torch.Tensor], look: Look) -> None:
        """Read tensors as they are stored, let them be looked at, and cast them into place."""
        stored = {
            name: torch.empty(local.shape, dtype=DTYPES[self.source.dtypes[name]], device=self.device)
            for name, local in locals_.items()
        }
        transfer(self.source, stored, list(stored), default_threads())
        for name, local in locals_.items():
            look(name, stored[name])
            local.copy_(stored.pop(name))
            self.looked_at.add(name)


def prepare_weights(
    model: PreTrainedModel,
    blocks: Mapping[str, nn.Module],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    finish: Callable[[], None] = lambda: None,
) -> BlockWeights:
    """Return what loads a model's blocks one by one; the model's buffers outside of blocks get their values.

    Args:
        model: the model on meta, whose blocks get parameters of their own where they are tied to another's.
        blocks: its blocks.
        checkpoint: the checkpoint.
        dtype: the dtype that floating-point tensors are cast to.
        device: the device of this rank.
        finish: called when every block has parameters of its own, before these are taken note of.

    Raises:
        MigratorError: the checkpoint is not that of the model.
    """
    tied = find_tied_names(model)
    stored_names = separate_blocks(model, blocks, tied)
    finish()
    refs = find_refs(model, stored_names)
    source = find_source(checkpoint, model, {name: ref for name, ref in refs.items() if stored_names[name] == name})
    non_persistent = rebuild_non_persistent(model, refs, dtype)
    by_block: defaultdict[str | None, list[Placed]] = defaultdict(list)
    for name, ref in refs.items():
        by_block[find_block_of(blocks, name)].append(Placed(name, stored_names[name], ref))
    set_buffers(model, non_persistent.buffers, device)
    return BlockWeights(by_block, source, dtype, device)


def find_refs(model: nn.Module, names: Mapping[str, str]) -> dict[str, ParameterRef]:
    """Return the tensors of some names, and the places in modules that refer to them."""
    tensors, entries = model_tensors(model), find_module_entries(model)
    return {name: ParameterRef(name, tensors[name], entries[id(tensors[name])]) for name in names}


def _get_local(tensor: torch.Tensor) -> torch.Tensor:
    local = getattr(tensor, "_local_tensor", tensor)
    assert isinstance(local, torch.Tensor)
    return local.detach()


def _install(entries: Sequence[ModuleEntry], tensor: torch.Tensor) -> None:
    for tensors, name in entries:
        tensors[name] = tensor
