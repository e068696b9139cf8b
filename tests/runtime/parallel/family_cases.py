"""Every causal language model of the installed transformers, tiny, made parallel by the SP plan derived for it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from plans.errors import MigratorError
from plans.mesh import Mesh, Mode
from runtime import Plan, parallelize, verify_sharding
from runtime.planning.resolve import resolve
from runtime.proving.tiny_model import tiny_config, tiny_model
from tests.runtime.parallel.parity_cases import gradient_errors, relative, token_ids

MODULE = "transformers.models.{0}.configuration_{0}"
_LARGEST = 1_000_000


def family_errors(family: str, class_name: str, mode: Mode) -> dict[str, float]:
    """Compare a family's model in a mode with the unsharded one, after one backward.

    In float64: some linear attentions are off by more than the tolerance in float32, whichever way they are cut.
    """
    reference = tiny_model(tiny_config(MODULE.format(family), class_name), torch.float64)
    model = copy.deepcopy(reference)
    size = dist.get_world_size()
    mesh = Mesh(tp=size, ep=size if mode.endswith("ep") else 1)
    resolved = parallelize(model, mesh, Plan.from_model(model, mode))
    verify_sharding(model, resolved)
    expected, found = after_backward(reference), after_backward(model)
    return {"logits": relative(found, expected), **gradient_errors(model, reference, resolved)}


def after_backward(model: Any) -> torch.Tensor:
    """Run a loss that weighs every logit differently and return the logits."""
    output: torch.Tensor = model(input_ids=token_ids((2, 16)), use_cache=False).logits
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).mean().backward()
    return output.detach()


def derivable() -> Iterator[tuple[str, str]]:
    """Yield each family and config class with a tiny model whose derived SP plan resolves."""
    known = transformers.AutoModelForCausalLM._model_mapping
    for folder in sorted((Path(transformers.__file__).parent / "models").iterdir()):
        if not (folder / f"configuration_{folder.name}.py").is_file():
            continue
        module = import_module(f"transformers.models.{folder.name}.configuration_{folder.name}")
        for name, found in inspect.getmembers(module, inspect.isclass):
            own = found.__module__ == module.__name__ and issubclass(found, transformers.PreTrainedConfig)
            if own and not found.sub_configs and found in known and _derives(folder.name, name, known[found]):
                yield folder.name, name


def _derives(family: str, class_name: str, model_class: Any) -> bool:
    try:
        with torch.device("meta"):
            model = model_class(tiny_config(MODULE.format(family), class_name))
    except Exception:  # What models raise at sizes that do not suit them is not ours to list.
        return False
    if sum(parameter.numel() for parameter in model.parameters()) > _LARGEST:
        return False
    try:
        resolve(model, Mesh(tp=2), plan=Plan.from_model(model, "sp"))
    except MigratorError:
        return False
    return True
