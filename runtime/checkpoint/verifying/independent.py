"""Reading a checkpoint through other people's code: transformers' loading of hub form, torch's reader of shard files.

Two layouts that were made through one tensor map, and are compared through it, look equal even where the map is wrong.
So each tensor is also digested as the other program reads it. What that cannot read is counted with the reason.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from plans.errors import MigratorError
from plans.text import first_line
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.files.file_names import find_shard_files
from runtime.checkpoint.files.remote import find_remote
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.hub.conversion import group_stored_names
from runtime.checkpoint.verifying.tensor_digest import digest_tensor
from runtime.models.config import find_quantization, read_config
from runtime.models.dtypes import DTYPES
from runtime.models.model import meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["IndependentReading", "read_independently"]


@dataclass(frozen=True)
class IndependentReading:
    """What another program reads of a checkpoint.

    Args:
        reader: the program, None if none can read the layout.
        digests: the digests of the tensors that it read, by name in the model.
        unread: the reason for each other tensor of the model.
    """

    reader: str | None
    digests: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)

    @property
    def reasons(self) -> list[str]:
        """The reasons why tensors were not read, the most frequent one first."""
        return [reason for reason, _ in Counter(self.unread.values()).most_common()]

    def to_json(self) -> dict[str, object]:
        """Return the JSON form, in numbers."""
        return {
            "reader": self.reader,
            "tensors": len(self.digests),
            "not_read": len(self.unread),
            "reasons": self.reasons,
        }


def read_independently(checkpoint: Checkpoint, max_memory: int) -> IndependentReading:
    """Read a checkpoint's tensors through another program, at most `max_memory` bytes at a time."""
    names = [name for name, info in checkpoint.tensors.items() if info.kind != "carried"]
    if any(find_remote(chunk.file) for chunk in checkpoint.chunks.values()):
        return IndependentReading(None, {}, dict.fromkeys(names, "it is read from where it lies, by ranges"))
    if checkpoint.layout == "hf":
        reader, read = "transformers", _read_with_transformers
    elif checkpoint.layout == "dcp":
        reader, read = "torch", _read_with_torch
    else:
        what = "rank files" if checkpoint.layout == "ranks" else "other stacks' rank files"
        return IndependentReading(None, {}, dict.fromkeys(names, f"no other program reads {what}"))
    digests: dict[str, str] = {}
    unread: dict[str, str] = {}
    for name, digest, reason in read(checkpoint, names, max_memory):
        if digest is not None:
            digests[name] = digest
        else:
            unread[name] = reason
    missing = [name for name in names if name not in digests and name not in unread]
    return IndependentReading(reader, digests, {**unread, **dict.fromkeys(missing, f"{reader} did not read it")})


_Row = tuple[str, str | None, str]
"""A tensor's name, its digest, and the reason if there is none."""


def _list_unread(names: Iterable[str], reason: str) -> Iterator[_Row]:
    return ((name, None, reason) for name in names)


def _batch(groups: Iterable[Sequence[str]], sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Yield groups joined up to a number of bytes; those that are larger alone are left out."""
    batch: list[str] = []
    total = 0
    for group in groups:
        size = sum(sizes[name] for name in group)
        if size > limit:
            continue
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch += group
        total += size
    if batch:
        yield batch


def _read_with_torch(checkpoint: Checkpoint, names: Sequence[str], max_memory: int) -> Iterator[_Row]:
    """Read shard files through torch's own reader. Its reader of `.distcp` files unpickles, so that is not used."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    if not find_shard_files(checkpoint.folder):
        yield from _list_unread(names, "torch's reader of .distcp files unpickles, which migrator never does")
        return
    tensors = {name: checkpoint.tensors[name] for name in names if checkpoint.tensors[name].dtype in DTYPES}
    sizes = {name: tensor_bytes(info.dtype, info.shape) for name, info in tensors.items()}
    yield from _list_unread([name for name in tensors if sizes[name] > max_memory], _TOO_LARGE)
    for batch in _batch([[name] for name in tensors], sizes, max_memory):
        state = {name: torch.empty(tensors[name].shape, dtype=DTYPES[tensors[name].dtype]) for name in batch}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(state, storage_reader=HuggingFaceStorageReader(str(checkpoint.folder)), no_dist=True)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            yield from _list_unread(batch, f"torch cannot read it: {first_line(error)}")
            continue
        yield from ((name, str(digest_tensor(tensor)), "") for name, tensor in state.items())


_TOO_LARGE = "larger than `max_memory`"


def _read_with_transformers(checkpoint: Checkpoint, names: Sequence[str], max_memory: int) -> Iterator[_Row]:
    """Read hub form through transformers' own loading, a few tensors of the model at a time."""
    if any(chunk.file.suffix != ".safetensors" for chunk in checkpoint.chunks.values()):
        yield from _list_unread(names, "transformers would unpickle it")
        return
    try:
        config = read_config(checkpoint.config_folder or checkpoint.folder)
        if find_quantization(config) is not None:
            yield from _list_unread(names, "transformers reads quantized weights for some devices only")
            return
        loader = _PartialLoader(checkpoint, meta_model(config))
    except MigratorError as error:
        yield from _list_unread(names, error.message)
        return
    yield from _list_unread(checkpoint.reoriented, "transformers takes its orientation from its shape, which is square")
    groups = group_stored_names(loader.model, checkpoint.chunks)
    sizes = {name: tensor.size for name, tensor in checkpoint.chunks.items()}
    for target, group in groups.items():
        if sum(sizes[name] for name in group) > max_memory:
            yield from _list_unread([target], _TOO_LARGE)
    wanted = set(names) - set(checkpoint.reoriented)
    for batch in _batch(groups.values(), sizes, max_memory):
        try:
            loaded = loader.load(batch)
        except Exception as error:  # what transformers' loading raises is not ours to list
            yield from _list_unread([t for t, group in groups.items() if set(group) <= set(batch)], first_line(error))
            continue
        for name, tensor in loaded.items():
            held_by = checkpoint.tied.get(name, name)
            if held_by in wanted:
                yield held_by, str(digest_tensor(tensor)), ""


class _PartialLoader:
    """Loads some tensors of a model as `from_pretrained` does, in the dtypes in which they are stored.

    Args:
        checkpoint: the checkpoint, in hub form.
        model: its model, on meta.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.checkpoint = checkpoint
        self.model = model
        self.conversions = get_model_conversion_mapping(model)
        self._empty: dict[str, torch.Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            info = checkpoint.tensors.get(checkpoint.tied.get(name, name))
            dtype = DTYPES.get(info.dtype, tensor.dtype) if info else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            self._empty[name] = torch.nn.Parameter(empty, requires_grad=False) if is_parameter else empty
            self._put(name)

    def load(self, stored: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the model's tensors that transformers makes of stored ones."""
        from safetensors import safe_open
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        files = {name: self.checkpoint.chunks[name].file for name in stored}
        opened = {file: safe_open(file, framework="pt") for file in set(files.values())}
        slices = {name: opened[file].get_slice(name) for name, file in files.items()}  # type: ignore[no-untyped-call]
        with _hide_progress():
            convert_and_load_state_dict_in_model(
                self.model, slices, LoadStateDictConfig(weight_mapping=list(self.conversions))
            )
        tensors = self.model.state_dict(keep_vars=True)
        loaded = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not self._empty[name]}
        for name in loaded:
            self._put(name)
        return loaded

    def _put(self, name: str) -> None:
        owner, _, own = name.rpartition(".")
        setattr(self.model.get_submodule(owner), own, self._empty[name])


@contextmanager
def _hide_progress() -> Iterator[None]:
    from transformers.utils import logging

    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            logging.enable_progress_bar()
