"""Functions that tests run on ranks, with real models to whose plans a wrong entry was added."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from plans.errors import MigratorError
from plans.mesh import Mesh, Mode
from plans.placement import Replicate, Shard
from plans.style import PlacementRule
from runtime import STYLES, ParallelStyle, Plan, full_state_dict, parallelize
from runtime.styles import HookSite, LocalParameters
from runtime.styles.collectives import all_gather
from tests.runtime.parallel.parity_cases import backward, compared, eager_config, gradient_errors, relative, token_ids
from tests.tiny_models import DENSE, tiny_model, with_noise


def read_refusal(name: str, mode: Mode, changes: Mapping[str, str | None], run: bool = False) -> str:
    """Return the message and hint that refuse a model's changed plan, or "accepted".

    Args:
        name: the model's name among the tiny models.
        mode: the mode of the plan that the changes apply to.
        changes: entries to replace or add, None to remove.
        run: whether the model is also run once.
    """
    config = eager_config(name)
    config.tie_word_embeddings = False
    model = tiny_model(config)
    entries = {**Plan.from_model(model, mode).entries, **changes}
    plan = Plan(mode, {key: style for key, style in entries.items() if style is not None})
    try:
        parallelize(model, Mesh(tp=dist.get_world_size()), plan)
        if run:
            model(input_ids=token_ids((2, 16)))
    except MigratorError as error:
        return f"{error.message} | {error.hint}"
    return "accepted"


_SET = re.compile(r"'(?P<key>[^']+)': '(?P<style>[a-z_0-9]+)'|'(?P<used>[a-z_0-9]+)' for '(?P<layer>[^']+)'")
_REMOVE = re.compile(r"remove the entry '([^']+)'(?: and that of '([^']+)')?")


def follow_hints(
    name: str, mode: Mode, changes: Mapping[str, str | None], alternative: int = 0
) -> tuple[list[str], float, float]:
    """Do what the hints of refusals say until a changed plan is accepted; return the hints and the errors then.

    Args:
        name: the model's name among the tiny models.
        mode: the mode of the plan that the changes apply to.
        changes: entries to replace or add, None to remove.
        alternative: which of the first hint's alternatives to take; of later ones the first is taken.
    """
    mesh = Mesh(tp=dist.get_world_size(), ep=dist.get_world_size() if mode.endswith("ep") else 1)
    entries = {**Plan.from_model(eager_config(name), mode).entries, **changes}
    plan = {key: style for key, style in entries.items() if style is not None}
    hints: list[str] = []
    for _ in range(8):
        try:
            errors = compared(name, Plan(mode, plan), mesh)
        except MigratorError as error:
            hints.append(error.hint)
            changed = [_follow(plan, part) for part in re.split(r",? or |; ", error.hint)]
            options = [option for option in changed if option != plan]
            if not options:
                raise AssertionError(f"{error.message} | {error.hint} says nothing that can be done") from error
            plan = options[min(alternative if len(hints) == 1 else 0, len(options) - 1)]
        else:
            return hints, errors.logits, errors.worst[1]
    raise AssertionError(f"no end of hints: {hints}")


def _follow(plan: Mapping[str, str], hint: str) -> dict[str, str]:
    """Return a plan changed as one alternative of a hint says."""
    followed = dict(plan)
    for found in _SET.finditer(hint):
        followed[found["key"] or found["layer"]] = found["style"] or found["used"]
    for key, parameter in _REMOVE.findall(hint):
        followed.pop(key, None)
        followed.pop(f"{key}.{parameter}", None)
    return followed


def gather_output(site: HookSite, run: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Gather a column-wise layer's output, as a user's own style may."""
    weight = site.parameter("weight")
    assert weight is not None
    return all_gather(run(site.shared_inputs.sum_gradient(inputs, site.axis)), site.axis, weight.shape[0])


def own_style(rules: bool, own: bool) -> tuple[float, tuple[str, float], tuple[int, ...]]:
    """Run a model with a style under a new name; return its errors and the local shape of the head that it shards."""
    style = ParallelStyle(
        "mine",
        gather_output,
        takes="whole",
        gives="whole",
        own=(LocalParameters("linear", (Shard(0),)),) if own else (),
        rules=(PlacementRule(Replicate(), parameter="bias"), PlacementRule(Shard(0))) if rules else (),
    )
    shapes: list[tuple[int, ...]] = []

    def record_shape(site: HookSite, run: Any, inputs: torch.Tensor) -> torch.Tensor:
        weight = site.parameter("weight")
        shapes.append(tuple(weight.to_local().shape))  # type: ignore[union-attr]
        return gather_output(site, run, inputs)

    styles = STYLES.register(ParallelStyle(style.name, record_shape, own=style.own, rules=style.rules, gives="whole"))
    errors = compared("qwen2", Plan("tp", {"lm_head": "mine"}), Mesh(tp=dist.get_world_size()), styles=styles)
    return errors.logits, errors.worst, shapes[0]


def saved(name: str, mode: Mode, mesh: Mesh) -> tuple[str, int, list[str]]:
    """Save a parallel model; return the refusal without a state, how many tensors were lost, and which differ."""
    reference, model = (tiny_model(eager_config(name)) for _ in range(2))
    parallelize(model, mesh, Plan.from_model(model, mode))
    message = ""
    try:
        model.save_pretrained("nowhere")
    except MigratorError as error:
        message = f"{error.message} | {error.hint}"
    state = full_state_dict(model)
    expected = reference.state_dict()
    if dist.get_rank():
        return message, len(expected) - len(state), []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=state)
        assert list(Path(folder).glob("*.safetensors"))
        loaded = type(reference).from_pretrained(folder, dtype=torch.float32).state_dict()
    differing = [
        key for key, value in expected.items() if not (_is_same(value, state[key]) and _is_same(value, loaded[key]))
    ]
    return message, len(expected), differing


def saved_after_a_step(mesh: Mesh) -> list[str]:
    """Return the tensors that differ from the unsharded model's after a forward and backward under FSDP."""
    reference, model = (tiny_model(eager_config("qwen3_moe")) for _ in range(2))
    parallelize(model, mesh, Plan.from_model(model, "tp_ep" if mesh.ep > 1 else "tp"))
    backward(model, token_ids((2, 16)))
    state = full_state_dict(model)
    return [key for key, value in reference.state_dict().items() if state and not _is_same(value, state[key])]


def _is_same(expected: torch.Tensor, tensor: torch.Tensor) -> bool:
    return expected.shape == tensor.shape and torch.equal(expected, tensor)


_VISION = {"hidden_size": 32, "intermediate_size": 52, "num_attention_heads": 4, "num_hidden_layers": 1}
_LLAMA4 = DENSE | {
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "intermediate_size_mlp": 52,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
}
_PATCHES = {
    "image_size": 16,
    "patch_size": 4,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "pixel_shuffle_ratio": 0.5,
}


def composite_config(name: str) -> Any:
    """Return a tiny config of a vision model: a model inside a model."""
    if name == "llama4":
        return transformers.Llama4Config(text_config=_LLAMA4, vision_config=_VISION | _PATCHES)
    text = {**DENSE, "num_hidden_layers": 2, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    return transformers.Lfm2VlConfig(text_config=text, vision_config=_VISION)


def composite(name: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(composite_config(name), attn_implementation="eager")
    for _, parameter in model.named_parameters():  # some classes leave a few uninitialised
        parameter.data = 0.2 * torch.randn_like(parameter) if parameter.ndim > 1 else torch.ones_like(parameter)
    return with_noise(model.float()).eval()


def composite_errors(name: str) -> dict[str, float]:
    """Compare a model inside a model with the unsharded one, on text."""
    reference, model = (composite(name) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        resolved = parallelize(model, Mesh(tp=dist.get_world_size()), Plan.from_model(model, "tp"))
    outputs = []
    for one in (reference, model):
        logits = one(input_ids=token_ids((2, 16)), use_cache=False).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).mean().backward()
        outputs.append(logits.detach())
    return {"logits": relative(outputs[1], outputs[0]), **gradient_errors(model, reference, resolved)}


def default_mode(mesh: Mesh, entries: dict[str, str] | None) -> str:
    model = tiny_model(eager_config("qwen3_moe"))
    return parallelize(model, mesh, entries).mode


def warned(name: str) -> list[str]:
    """Return the warnings raised as a model is made parallel by its own plan."""
    model = tiny_model(eager_config(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        parallelize(model, Mesh(tp=dist.get_world_size()), Plan.from_model(model, "tp"))
    return [str(one.message) for one in caught if one.category is UserWarning]
