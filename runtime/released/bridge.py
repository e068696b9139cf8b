"""Register this runtime's styles with an installed transformers release, so that it can run rewritten plans.

`from_pretrained(distributed_config=DistributedConfig(tp_size=N))` looks up every style of a plan by name, and asks it
to shard parameters and to hook modules. `ReleasedStyle` puts a style of this runtime behind that interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Protocol

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import _StridedShard

from plans.errors import IndivisibleError, PlanError, UsageError
from plans.placement import Packed, Placement, Replicate
from plans.style import Style
from runtime.models.config import transformers_version
from runtime.parallel.hooks import wrap_forward
from runtime.planning.plan import runtime_dialect
from runtime.released.support import PARALLELIZE_HINT, Support
from runtime.styles import STYLES, HookSite, ParallelStyle
from runtime.styles.style import get_owner_kind

__all__ = ["ReleasedStyle", "register_styles"]

_MIN_RELEASE = (5, 17)
_INTERFACE = ("validate_param", "shard_param", "install_forward")

_EXCLUDED = frozenset({"ep_router"})
"""Not registered: hooked on a router alone, such a style could not see the experts that its choices are for."""


def register_styles() -> Support:
    """Register the style names that the installed transformers, 5.17 or newer, lacks and this runtime can run.

    Call it on every rank before `from_pretrained`. Styles that the release already has are not replaced, and calling it
    again changes nothing.

    Returns:
        The names that were registered, and a check for whether the release can run a plan.

    Raises:
        DependencyError: transformers is not installed.
        UsageError: the release's registry has a different interface, or transformers would load packed parameters into
            the wrong rows with the installed torch.
    """
    registry = _find_registry(transformers_version())
    _check_torch()
    dialect = runtime_dialect()
    present = _EXCLUDED.union(registry)
    for name in STYLES.names:
        if name in dialect.styles and name not in present:
            registry.register(name, ReleasedStyle(STYLES.styles[name], dialect.styles[name]))
    registered = sorted(name for name in registry if isinstance(registry[name], ReleasedStyle))
    return Support(transformers_version(), tuple(registered), frozenset(registry))


@dataclass(frozen=True)
class ReleasedStyle:
    """One of this runtime's styles, with the interface that transformers 5.17 to 5.24 expect of theirs.

    Args:
        style: what the style does around a module's forward.
        entry: where the style places parameters.
    """

    style: ParallelStyle
    entry: Style

    def validate_param(
        self, module: nn.Module, param: str, mesh: DeviceMesh, parameter_name: str | None = None
    ) -> None:
        """Refuse a parameter that this style cannot shard.

        Raises:
            PlanError: the style only shards parameters, and is not defined for this number of dims.
            IndivisibleError: a packed group does not divide by the size of the mesh axis.
        """
        name, tensor = parameter_name or param, module.get_parameter(param)
        if self.entry.job == "parameter" and self.entry.meaning(f"parameter {tensor.ndim}") is None:
            raise PlanError(
                f"{name}: {self.style.name!r} is not defined for a parameter with {tensor.ndim} dims",
                hint="remove the entry or choose another style",
                parameter=name,
                style=self.style.name,
            )
        placement = self._resolve_placement(module, param)
        if isinstance(placement, Packed):
            _check_groups(name, tensor.shape[placement.dim], placement.groups, _get_tp_axis(mesh).size())

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        """Replace a parameter on the meta device by a placeholder that its shard will be loaded into."""
        placement = self._resolve_placement(module, param)
        if placement not in (None, Replicate()):
            self.style.shard(self._build_site(module, mesh), param, placement)

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Wrap a module's forward with the style.

        Raises:
            PlanError: the style is for parameters, or cannot hook this module.
        """
        site = self._build_site(module, mesh)
        if self.style.around is None:
            raise PlanError(
                f"{self.style.name!r} is for parameters, but its key names a module, a {type(module).__name__}",
                hint="name the parameter itself in the key, and give the module an entry that communicates",
                style=self.style.name,
            )
        self.style.check(site)
        module.forward = wrap_forward(site, self.style.around, module.forward)
        return module

    def _resolve_placement(self, module: nn.Module, param: str) -> Placement | None:
        tensor = module._parameters.get(param)
        return None if tensor is None else self.entry.placement(get_owner_kind(module), tensor.ndim, param)

    def _build_site(self, module: nn.Module, mesh: DeviceMesh) -> HookSite:
        config = getattr(module, "config", None)
        kind = type(module).__name__
        return HookSite(kind, module, _get_tp_axis(mesh), config, self.style.name)


class _Registry(Protocol):
    def register(self, key: str, value: object) -> None: ...
    def __getitem__(self, key: str) -> object: ...
    def __iter__(self) -> Iterator[str]: ...


def _find_registry(release: str) -> _Registry:
    """Return the release's registry of styles.

    Raises:
        UsageError: its styles do not have the known interface.
    """
    older = tuple(int(part) for part in release.split(".")[:2]) < _MIN_RELEASE
    module = None if older else _import_if_installed("transformers.distributed.tensor_parallel")
    layer = getattr(module, "TensorParallelLayer", None)
    if not all(hasattr(layer, method) for method in _INTERFACE):
        raise UsageError(
            f"styles cannot be registered with transformers {release}: "
            + ("it skips unknown styles or calls styles differently" if older else "it calls styles in an unknown way"),
            hint=f"install transformers 5.17 to 5.24, or {PARALLELIZE_HINT}",
            version=release,
        )
    registry: _Registry = vars(module)["ALL_PARALLEL_STYLES"]
    return registry


def _import_if_installed(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return None


def _check_torch() -> None:
    """Refuse a torch whose packed placements claim to be plain shards, which transformers would load them as.

    Source: `DtensorShardOperation` of transformers 5.17.0 to 5.24.0; torch 2.8.0 and 2.9.1, whose `_StridedShard` is a
    `Shard`.
    """
    if _StridedShard(0, split_factor=2).is_shard():
        import torch

        raise UsageError(
            f"with torch {torch.__version__}, transformers would load gate_up_proj into the wrong rows",
            hint=f"install torch 2.13 or newer, or {PARALLELIZE_HINT}",
            version=str(torch.__version__),
        )


def _check_groups(name: str, size: int, groups: int, ranks: int) -> None:
    if size % (groups * ranks):
        works = [count for count in range(1, size // groups + 1) if not size % (groups * count)]
        raise IndivisibleError(
            f"{name}: tp={ranks} does not divide its {groups} packed groups of {size // groups} each",
            hint="sizes that work: " + ", ".join(map(str, works)),
            what=name,
            size=size // groups,
            works=works,
        )


def _get_tp_axis(mesh: DeviceMesh) -> DeviceMesh:
    return mesh if mesh.ndim == 1 else mesh["tp"]
