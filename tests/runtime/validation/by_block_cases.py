"""What tests let ranks validate block by block, and styles that are wrong in one block; sent to ranks by name."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plans.mesh import Mesh, Mode
from runtime.styles import STYLES, HookSite, ParallelStyle, StyleRegistry
from runtime.validation.request import ValidationRequest
from runtime.validation.validate import validate

__all__ = ["count_parameter_bytes", "validate_by_block", "with_wrong_block"]


def validate_by_block(
    folder: Path,
    mesh: Mesh | None = None,
    mode: Mode = "tp",
    reference: Path | None = None,
    styles: StyleRegistry = STYLES,
) -> dict[str, Any]:
    mesh = mesh or Mesh(tp=dist.get_world_size())
    return validate(ValidationRequest(folder, mesh, mode, reference, by_block=True), styles).to_json()


def with_wrong_block(defect: str, block: str, folder: Path, mesh: Mesh, mode: Mode) -> dict[str, Any]:
    """Validate with a style that is wrong in one block only."""
    name, around = DEFECTS[defect]
    style = STYLES.styles[name]
    styles = STYLES.register(replace(style, around=partial(around, style, block)))
    return validate_by_block(folder, mesh, mode, None, styles)


def unsummed(style: ParallelStyle, block: str, site: HookSite, run: Any, *args: object, **kwargs: object) -> object:
    """Leave out what the style does around the forward."""
    return run(*args, **kwargs) if site.name.startswith(f"{block}.") else style.around(site, run, *args, **kwargs)


def doubled_gradient(
    style: ParallelStyle, block: str, site: HookSite, run: Any, *args: object, **kwargs: object
) -> object:
    """Return the right output with twice its gradient."""
    output = style.around(site, run, *args, **kwargs)
    return 2 * output - output.detach() if site.name.startswith(f"{block}.") else output


def without_router_gradient(
    style: ParallelStyle, block: str, site: HookSite, run: Any, *args: Any, **kwargs: object
) -> object:
    """Give no gradient to the router's weights of the experts."""
    if site.name.startswith(f"{block}."):
        args = (*args[:2], args[2].detach(), *args[3:])
    return style.around(site, run, *args, **kwargs)


def failing(style: ParallelStyle, block: str, site: HookSite, run: Any, *args: object, **kwargs: object) -> object:
    if site.name.startswith(f"{block}."):
        raise IndexError("no such expert")
    return style.around(site, run, *args, **kwargs)


DEFECTS: dict[str, tuple[str, Any]] = {
    "a lost sum": ("rowwise", unsummed),
    "a lost sum of gradients": ("colwise", unsummed),
    "a doubled gradient": ("rowwise", doubled_gradient),
    "a router without its gradient": ("ep_dispatch_experts", without_router_gradient),
    "a failure": ("rowwise", failing),
}


def count_parameter_bytes() -> int:
    """Return the bytes of all parameters, and of their gradients, that are in memory now."""
    found: dict[int, int] = {}
    for one in gc.get_objects():
        if issubclass(type(one), nn.Parameter):
            for tensor in (one, one.grad):
                local = getattr(tensor, "_local_tensor", tensor)
                if isinstance(local, torch.Tensor) and not local.is_meta:
                    found[local.untyped_storage()._cdata] = local.untyped_storage().size()
    return sum(found.values())
