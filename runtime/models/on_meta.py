"""Models built without memory for their parameters: on the meta device, while the values of buffers are real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["init_on_meta"]

Model = TypeVar("Model", bound=nn.Module)

_EMPTY_FACTORIES: frozenset[object] = frozenset({torch.empty})
_FILL_FACTORIES: frozenset[object] = frozenset({torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})
_LARGE = 2**24
"""Elements; fewer cost no time worth saving."""


def init_on_meta(build: Callable[[], Model], dtype: torch.dtype | None) -> Model:
    """Build a model with parameters on meta and buffers real.

    A class may fill a parameter with zeros and takes its full size for it before it is a parameter. So what is large
    is filled on meta. Where that was a buffer after all, or met real tensors, the model is built again without.

    Args:
        build: makes the model.
        dtype: that floating-point tensors have where the class does not say.
    """
    with _MetaFactoryMode(largest=_LARGE) as redirected:
        try:
            model = _init_parameters_on_meta(build, dtype)
        except Exception:  # What transformers' model classes raise is not ours to list.
            if not redirected.has_redirected_large:
                raise
        else:
            if not (redirected.has_redirected_large and any(buffer.is_meta for buffer in model.buffers())):
                return model
    with _MetaFactoryMode(largest=None):
        return _init_parameters_on_meta(build, dtype)


def _init_parameters_on_meta(build: Callable[[], Model], dtype: torch.dtype | None) -> Model:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _default_dtype(dtype):
        return build()


class _MetaFactoryMode(TorchFunctionMode):
    """Puts uninitialised tensors on meta at once, and those filled with more than `largest` elements."""

    def __init__(self, largest: int | None) -> None:
        super().__init__()
        self.largest = largest
        self.has_redirected_large = False

    def __torch_function__(
        self,
        func: Callable[..., torch.Tensor],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = dict(kwargs or {})
        if func in _EMPTY_FACTORIES:
            return func(*args, **{**given, "device": "meta"})
        if func in _FILL_FACTORIES and self.largest is not None:
            on_meta = func(*args, **{**given, "device": "meta"})
            if on_meta.numel() > self.largest:
                self.has_redirected_large = True
                return on_meta
        return func(*args, **given)


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
