"""The pipeline stages of a model: which of them hold each tensor, as the installed transformers decides it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from plans.errors import PlanError, UsageError
from plans.mesh import Mesh
from plans.pipeline import PipelineSplit, find_split, split_layers
from plans.text import format_names
from runtime.models.config import transformers_version
from runtime.models.model import find_tied_names, model_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BASE_PARTS", "find_stages"]

BASE_PARTS = ("embed_tokens", "layers", "norm")
"""What a base model consists of, by its attributes: only of these does transformers know the stage."""

_HEAD = "lm_head"
_HINT = "leave `pp` out: no release of transformers splits this model over stages"


def find_stages(model: PreTrainedModel, mesh: Mesh) -> Mapping[str, tuple[int, ...]]:
    """Return the stages that hold each tensor of a model, by name; empty if the mesh has only one.

    Args:
        model: the model, on meta or not, whole.
        mesh: the sizes of the mesh axes.

    Raises:
        UsageError: the installed transformers has no such stages, or there are more of them than layers.
        PlanError: the model has other parts than the embedding, layers, norm and head that transformers splits.

    Source: `find_rank_for_key` and `apply_pipeline_parallelism` in distributed/pipeline_parallel.py of transformers.
    """
    if mesh.pp == 1:
        return {}
    split = _require_split(mesh)
    prefix = _check_parts(model)
    count = len(model.get_submodule(f"{prefix}.layers"))
    if mesh.pp > count:
        raise UsageError(
            f"pp={mesh.pp} stages cannot share {count} layers",
            hint=f"choose `pp` of {count} or less",
            pp=mesh.pp,
            layers=count,
        )
    stage_of = {
        str(layer): stage
        for stage, layers in enumerate(split_layers(count, mesh.pp, split.remainder))
        for layer in layers
    }
    last = mesh.pp - 1
    stages = {name: _find_stage(name, prefix, stage_of, last) for name in model_tensors(model)}
    if unknown := [name for name, stage in stages.items() if stage is None]:
        raise PlanError(
            f"{type(model).__name__} has {format_names(unknown)}, which belong to no stage of a pipeline",
            hint=_HINT,
            names=unknown,
        )
    held = {name: {stage} for name, stage in stages.items() if stage is not None}
    for name, target in find_tied_names(model).items():
        held[target] |= held[name]
    return {name: tuple(sorted(numbers)) for name, numbers in held.items()}


def _require_split(mesh: Mesh) -> PipelineSplit:
    version = transformers_version()
    split = find_split(version)
    if split is None or (mesh.tp > 1 and not split.tensor_parallel):
        lacking = "no pipeline stages" if split is None else "pipeline stages of single ranks only"
        raise UsageError(
            f"transformers {version} has {lacking}, but the mesh is {mesh}",
            hint="install transformers 5.18 or newer",
            version=version,
        )
    return split


def _check_parts(model: PreTrainedModel) -> str:
    """Return the name of the base model, after checking that it has the parts that stages are made of."""
    prefix = str(model.base_model_prefix)
    base = getattr(model, prefix, None)
    missing = [part for part in BASE_PARTS if not isinstance(getattr(base, part, None), nn.Module)]
    if missing or not isinstance(base.layers, nn.ModuleList):  # type: ignore[union-attr]
        where = f"its `{prefix}`" if isinstance(base, nn.Module) else "a base model"
        raise PlanError(
            f"{type(model).__name__} lacks {', '.join(f'`{part}`' for part in missing or ['layers'])} in {where}, "
            "by which transformers splits a model over pipeline stages",
            hint=_HINT,
            model=type(model).__name__,
        )
    return prefix


def _find_stage(name: str, prefix: str, stage_of: Mapping[str, int], last: int) -> int | None:
    """Return the stage of a tensor, None if transformers knows none."""
    if name.startswith(f"{prefix}.embed_tokens."):
        return 0
    if name.startswith((f"{prefix}.norm.", f"{_HEAD}.")):
        return last
    if name.startswith(f"{prefix}.layers."):
        return stage_of[name.removeprefix(f"{prefix}.layers.").partition(".")[0]]
    return None
