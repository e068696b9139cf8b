"""What tests let ranks validate, and the styles that do wrong without a word; module-level, to be sent by name."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plans.mesh import Mesh, Mode
from runtime.styles import STYLES, HookSite, ParallelStyle, StyleRegistry
from runtime.validation import backward
from runtime.validation import validate as looking
from runtime.validation.request import ValidationRequest
from runtime.validation.results import PARTS
from runtime.validation.validate import validate as validate_checkpoint
from tests.runtime.parallel.verify_cases import leave_whole

__all__ = [
    "PARTS",
    "forgets_before_it_widens",
    "validate",
    "with_style",
    "with_wide_weights",
    "without_gradients",
    "without_room",
]


def validate(
    folder: Path,
    reference: Path | None = None,
    mesh: Mesh | None = None,
    mode: Mode = "tp",
    styles: StyleRegistry = STYLES,
) -> dict[str, Any]:
    request = ValidationRequest(folder, mesh or Mesh(tp=dist.get_world_size()), mode, reference)
    return validate_checkpoint(request, styles).to_json()


def with_style(change: str, style: str, folder: Path, mesh: Mesh | None = None, mode: Mode = "tp") -> dict[str, Any]:
    """Validate with a style that is changed for the worse."""
    return validate(folder, None, mesh, mode, STYLES.register(CHANGES[change](STYLES.styles[style])))


def without_room(folder: Path, mesh: Mesh, mode: Mode) -> dict[str, Any]:
    """Validate where the unsharded model has no room on one rank."""
    has_room = looking.fits_in_memory
    looking.fits_in_memory = lambda model, device: False
    try:
        return validate(folder, None, mesh, mode)
    finally:
        looking.fits_in_memory = has_room


def forgets_before_it_widens(folder: Path) -> bool:
    """Validate, and say whether the model in the checkpoint's own type was gone when the one in float32 was made."""
    made: list[weakref.ref[Any]] = []
    gone: list[bool] = []
    made_parallel = looking.build_parallel_model

    def watched(*args: Any) -> Any:
        gone.extend(model() is None for model in made)
        parallel = made_parallel(*args)
        made.append(weakref.ref(parallel.model))
        return parallel

    looking.build_parallel_model = watched
    gc.disable()
    try:
        validate(folder)
    finally:
        looking.build_parallel_model = made_parallel
        gc.enable()
    assert len(gone) == 1
    return gone[0]


def without_gradients(folder: Path) -> dict[str, Any]:
    """Validate a model through which no gradient comes, parallel or not."""
    compute = backward.compute_gradients

    def fail(*args: Any) -> None:
        raise RuntimeError("no derivative")

    backward.compute_gradients = fail
    try:
        return validate(folder)
    finally:
        backward.compute_gradients = compute


def with_wide_weights(name: str, folder: Path) -> dict[str, Any]:
    """Validate where loading leaves a tensor in a wider type than the checkpoint's."""
    loaded = looking.load_weights

    def widened(parallel: Any, *args: Any) -> None:
        loaded(parallel, *args)
        parameter = parallel.model.get_parameter(name)
        parameter.data = parameter.data.double()

    looking.load_weights = widened
    try:
        return validate(folder)
    finally:
        looking.load_weights = loaded


def fail(site: HookSite, run: Any, *args: object, **kwargs: object) -> object:
    raise IndexError("no such expert\nand more that no one needs")


def bare(site: HookSite, run: Any, *args: object, **kwargs: object) -> object:
    return run(*args, **kwargs)


def exhausted(
    style: ParallelStyle, forwards: bool, site: HookSite, run: Any, *args: object, **kwargs: object
) -> object:
    """Have no memory for what backward needs, or for nothing at all."""
    if torch.is_grad_enabled() or not forwards:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    return style.around(site, run, *args, **kwargs)


def doubled(style: ParallelStyle, site: HookSite, run: Any, *args: object, **kwargs: object) -> object:
    return 2 * style.around(site, run, *args, **kwargs)


def coarse(style: ParallelStyle, site: HookSite, run: Any, *args: object, **kwargs: object) -> object:
    """Be right in float32 only."""
    output = style.around(site, run, *args, **kwargs)
    return output if output.dtype == torch.float32 else 0.5 * output


CHANGES: dict[str, Callable[[ParallelStyle], ParallelStyle]] = {
    "silent": lambda style: replace(style, shard=leave_whole),
    "failing": lambda style: replace(style, around=fail),
    "unsummed": lambda style: replace(style, around=bare),
    "doubled": lambda style: replace(style, around=partial(doubled, style)),
    "without memory": lambda style: replace(style, around=partial(exhausted, style, False)),
    "without memory for gradients": lambda style: replace(style, around=partial(exhausted, style, True)),
    "coarse": lambda style: replace(style, around=partial(coarse, style)),
}
