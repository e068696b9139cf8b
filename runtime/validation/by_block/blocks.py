"""The blocks of a model: its repeated layers, and what lies outside them; and their calls, taken over by a handler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from plans.errors import UsageError
from plans.text import format_names
from runtime.models.model import model_tensors

__all__ = ["BlockCall", "find_block_of", "find_blocks", "intercept_calls", "separate_blocks"]

BlockCall = Callable[[str, Callable[..., object], tuple[Any, ...], dict[str, Any]], object]
"""`(block, run, args, kwargs) -> output`, in which `run` is the block's own call."""


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's blocks by name, in the model's order: each parameter is in exactly one, unless it is tied.

    The members of lists of modules are blocks: these are the repeated layers. So is every other module that holds
    parameters and no such list, such as an embedding, a norm, or a head, and one that holds parameters of its own.

    Raises:
        UsageError: the model holds parameters beside its blocks.
    """
    blocks: dict[str, nn.Module] = {}

    def visit(prefix: str, module: nn.Module, *, is_listed: bool) -> None:
        if next(module.parameters(), None) is None or module in blocks.values():
            return
        if _is_container(module) or module is model or not (is_listed or _is_block(module)):
            for name, child in module.named_children():
                is_member = isinstance(module, (nn.ModuleList, nn.ModuleDict))
                visit(f"{prefix}.{name}" if prefix else name, child, is_listed=is_member)
        else:
            blocks[prefix] = module

    visit("", model, is_listed=False)
    if own := [name for name, _ in model.named_parameters(recurse=False)]:
        raise UsageError(
            f"{type(model).__name__} cannot be validated block by block: it holds {format_names(own)} beside its "
            "blocks",
            hint="validate it whole, on a machine with more memory",
            model=type(model).__name__,
        )
    return blocks


def _is_block(module: nn.Module) -> bool:
    has_list = any(
        isinstance(inner, nn.ModuleList) and next(inner.parameters(), None) is not None for inner in module.modules()
    )
    return not has_list or next(module.parameters(recurse=False), None) is not None


def _is_container(module: nn.Module) -> bool:
    """Return whether a module has no forward: only its members are called."""
    return type(module).forward is nn.Module.forward


def find_block_of(blocks: Mapping[str, nn.Module], name: str) -> str | None:
    """Return the block that a tensor's name belongs to, None for a buffer outside of all blocks."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in blocks), None)


def separate_blocks(model: nn.Module, blocks: Mapping[str, nn.Module], tied: Mapping[str, str]) -> dict[str, str]:
    """Give each block parameters of its own in the place of those that are tied to another block's, on meta.

    Args:
        model: the model, on meta.
        blocks: its blocks.
        tied: the tied names, each with the name that holds the bytes.

    Returns:
        The name of every tensor of the model as it is now, each with the name by which checkpoints store it.
    """
    first: dict[tuple[str | None, str], nn.Parameter] = {}
    for name, holder in tied.items():
        owner, _, key = name.rpartition(".")
        block = find_block_of(blocks, name)
        if block in (None, find_block_of(blocks, holder)):  # None: another name of a module that is a block already
            continue
        parameter = model.get_parameter(holder)
        own = first.setdefault((block, holder), nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        model.get_submodule(owner)._parameters[key] = own
    unique: dict[int, str] = {}
    for name, tensor in model_tensors(model).items():
        unique.setdefault(id(tensor), name)
    return {name: tied.get(name, name) for name in unique.values()}


@contextmanager
def intercept_calls(blocks: Mapping[str, nn.Module], handle: BlockCall) -> Iterator[None]:
    """Let a handler take over the calls of blocks, with all hooks that are around them."""
    with ExitStack() as stack:
        for name, module in blocks.items():
            original = type(module)
            run = partial(original.__call__, module)
            members = {"__call__": _make_call(name, run, handle), "__module__": original.__module__}
            module.__class__ = type(original.__name__, (original,), members)
            stack.callback(setattr, module, "__class__", original)
        yield


def _make_call(name: str, run: Callable[..., object], handle: BlockCall) -> Callable[..., object]:
    def call(_: nn.Module, *args: object, **kwargs: object) -> object:
        return handle(name, run, args, kwargs)

    return call
