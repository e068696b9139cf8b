"""Tensors that reach a block other than by its arguments: they would escape the comparison, so they are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from plans.errors import UsageError
from runtime.validation.by_block.boundary import list_tensors

__all__ = ["refuse_side_channels"]


@contextmanager
def refuse_side_channels(block: str, module: nn.Module, inputs: Sequence[torch.Tensor]) -> Iterator[None]:
    """Refuse a block that computes with tensors that it neither holds, nor makes, nor was given.

    Args:
        block: the block's name.
        module: the block, its weights in memory.
        inputs: the tensors among its arguments.

    Raises:
        UsageError: it does.
    """
    with _WatchingMode([*inputs, *_list_own_tensors(module)]) as watched:
        yield
    if watched.foreign is not None:
        raise UsageError(
            f"{block} cannot be validated by itself: it computes with a tensor of the shape "
            f"{list(watched.foreign.shape)} that is not among its arguments, in {watched.where}",
            hint="validate the whole model, on a machine with more memory",
            block=block,
        )


def _list_own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for inner in module.modules():
        for values in (inner._parameters, inner._buffers, vars(inner)):
            yield from list_tensors(dict(values))
        # What gradients are added to.
        yield from (value.grad for value in inner.parameters(recurse=False) if value.grad is not None)


class _WatchingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first tensor that an operation takes although nothing known so far holds its memory."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.foreign: torch.Tensor | None = None
        self.where = ""
        self._known = {_get_memory(tensor) for tensor in known}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        options = dict(kwargs or {})
        foreign = [tensor for tensor in list_tensors([args, options]) if _get_memory(tensor) not in self._known]
        # What is lifted is a constant of the code.
        if foreign and self.foreign is None and "lift_fresh" not in str(func):
            self.foreign, self.where = foreign[0], str(func)
        result = func(*args, **options)
        self._known |= {_get_memory(tensor) for tensor in list_tensors([result, args])}
        return result


def _get_memory(tensor: torch.Tensor) -> int:
    memory: int = tensor.untyped_storage()._cdata
    return memory
