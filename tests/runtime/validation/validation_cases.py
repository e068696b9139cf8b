"""What tests let ranks validate, and the styles that do wrong without a word; module-level, to be sent by name."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plans.mesh import Mesh, Mode
from runtime.styles import STYLES, HookSite, ParallelStyle, StyleRegistry
from runtime.validation import backward, precision
from runtime.validation import validate as looking
from runtime.validation.request import ValidationRequest
from runtime.validation.results import PARTS
from runtime.validation.validate import validate as validate_checkpoint
from tests.runtime.parallel.verify_cases import leave_whole

__all__ = [
    "PARTS",
    "forgets_before_it_widens",
    "validate",
    "validate_allowing",
    "with_defect",
    "with_style",
    "with_wide_weights",
    "without_gradients",
    "without_room",
    "without_room_for_float64",
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


def validate_allowing(folder: Path, patterns: tuple[str, ...], mesh: Mesh | None = None) -> dict[str, Any]:
    """Validate, with patterns of what need not be exercised."""
    request = ValidationRequest(folder, mesh or Mesh(tp=dist.get_world_size()), allow_unexercised=patterns)
    return validate_checkpoint(request).to_json()


def with_style(change: str, style: str, folder: Path, mesh: Mesh | None = None, mode: Mode = "tp") -> dict[str, Any]:
    """Validate with a style that is changed for the worse."""
    return validate(folder, None, mesh, mode, STYLES.register(CHANGES[change](STYLES.styles[style])))


def without_room(folder: Path, mesh: Mesh, mode: Mode) -> dict[str, Any]:
    """Validate where the unsharded model has no room on one rank."""
    has_room = looking.fits_in_memory
    looking.fits_in_memory = lambda model, device, dtype: False
    try:
        return validate(folder, None, mesh, mode)
    finally:
        looking.fits_in_memory = has_room


def without_room_for_float64(folder: Path) -> dict[str, Any]:
    """Validate where float64 has no room."""
    has_room = precision.fits_in_memory
    precision.fits_in_memory = lambda model, device, dtype: dtype != torch.float64
    try:
        return validate(folder)
    finally:
        precision.fits_in_memory = has_room


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
    compute = backward.accumulate_gradients

    def fail(*args: Any) -> None:
        raise RuntimeError("no derivative")

    backward.accumulate_gradients = fail
    try:
        return validate(folder)
    finally:
        backward.accumulate_gradients = compute


def with_wide_weights(name: str, folder: Path) -> dict[str, Any]:
    """Validate where loading leaves a tensor in a wider type than the checkpoint's."""
    loaded = find_original("load_weights")

    def widened(parallel: Any, *args: Any) -> None:
        loaded(parallel, *args)
        parameter = parallel.model.get_parameter(name)
        parameter.data = parameter.data.double()

    with patched("load_weights", widened):
        return validate(folder)


def with_defect(defect: str, name: str, folder: Path, mesh: Mesh, mode: Mode = "tp") -> dict[str, Any]:
    """Validate with gradients that a defect in training makes wrong, in the module or parameter of a name."""
    build = find_original("build_parallel_model")

    def build_with_defect(*args: Any) -> Any:
        parallel = build(*args)
        DEFECTS[defect](parallel.model, name, mesh)
        return parallel

    with patched("build_parallel_model", build_with_defect):
        return validate(folder, None, mesh, mode)


_patching: Counter[str] = Counter()
_patching_originals: dict[str, Any] = {}


def find_original(name: str) -> Any:
    """Return a function of the validation as it is without `patched`."""
    return _patching_originals.setdefault(name, getattr(looking, name))


@contextmanager
def patched(name: str, value: object) -> Iterator[None]:
    """Replace a function of the validation, once for all ranks if they are threads of one process."""
    original = find_original(name)
    if not _patching[name]:
        setattr(looking, name, value)
    _patching[name] += 1
    try:
        yield
    finally:
        _patching[name] -= 1
        if not _patching[name]:
            setattr(looking, name, original)


class _OwnChunk:
    """A reduce-scatter that leaves each rank its own gradient."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        # The sum over ranks is divided by their number afterwards.
        chunk = input_tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)]
        output_tensor.copy_(chunk * dist.get_world_size(group))


def _leave_unreduced(model: Any, name: str, mesh: Mesh) -> None:
    model.get_submodule(name).set_custom_reduce_scatter(_OwnChunk())


def _sum_instead_of_averaging(model: Any, name: str, mesh: Mesh) -> None:
    model.get_submodule(name).set_gradient_divide_factor(1.0)


def _divide_by_world_size(model: Any, name: str, mesh: Mesh) -> None:
    model.get_submodule(name).set_gradient_divide_factor(float(mesh.world_size))


def _leave_replicas_alone(model: Any, name: str, mesh: Mesh) -> None:
    model.get_submodule(name).set_requires_all_reduce(False)


def _divide_by_expert_group(model: Any, name: str, mesh: Mesh) -> None:
    model.get_submodule(name).set_gradient_divide_factor(float(mesh.efsdp))


def _double(model: Any, name: str, mesh: Mesh) -> None:
    _replace_gradient(model, name, lambda gradient: 2 * gradient)


def _turn(model: Any, name: str, mesh: Mesh) -> None:
    _replace_gradient(model, name, lambda gradient: gradient.roll(1, 0))


def _replace_gradient(model: Any, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change a parameter's gradient whenever its owner runs, since loading replaces the parameter itself."""
    owner, _, key = name.rpartition(".")

    def watch(module: Any, *_: object) -> None:
        parameter = module._parameters[key]
        if torch.is_grad_enabled() and not hasattr(parameter, "is_watched"):
            parameter.register_hook(change)
            parameter.is_watched = True

    model.get_submodule(owner).register_forward_pre_hook(watch)


DEFECTS: dict[str, Callable[[Any, str, Mesh], None]] = {
    "not reduced": _leave_unreduced,
    "summed": _sum_instead_of_averaging,
    "divided by the world size": _divide_by_world_size,
    "not reduced over replicas": _leave_replicas_alone,
    "divided by the expert group's size": _divide_by_expert_group,
    "doubled": _double,
    "turned": _turn,
}


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
    """Be right in float32 and float64 only."""
    output = style.around(site, run, *args, **kwargs)
    return output if output.dtype in (torch.float32, torch.float64) else 0.5 * output


CHANGES: dict[str, Callable[[ParallelStyle], ParallelStyle]] = {
    "silent": lambda style: replace(style, shard=leave_whole),
    "failing": lambda style: replace(style, around=fail),
    "unsummed": lambda style: replace(style, around=bare),
    "doubled": lambda style: replace(style, around=partial(doubled, style)),
    "without memory": lambda style: replace(style, around=partial(exhausted, style, False)),
    "without memory for gradients": lambda style: replace(style, around=partial(exhausted, style, True)),
    "coarse": lambda style: replace(style, around=partial(coarse, style)),
}
