"""The parts of validation block by block: blocks found, boundaries, side channels, ties, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn

from plans.errors import UsageError
from plans.mesh import Mesh
from runtime import run_on_ranks
from runtime.models.model import meta_model
from runtime.validation.by_block import weights
from runtime.validation.by_block.blocks import find_blocks
from runtime.validation.by_block.boundary import Layouts, Slice, list_tensors, replace_tensors, write_back
from runtime.validation.by_block.routing import RoutingDifference, follow_choices
from runtime.validation.by_block.side_channels import refuse_side_channels
from runtime.validation.by_block.unsharded import Choices
from tests.runtime.validation import by_block_cases
from tests.tiny_models import tiny_config
from tests.tiny_multimodal import MULTIMODAL, multimodal_config

HubFolder = Callable[[str], Path]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("name", MULTIMODAL)
def test_each_parameter_is_in_one_block_or_tied(name: str) -> None:
    model = meta_model(multimodal_config(name))
    blocks = find_blocks(model)
    held = [parameter for block in blocks.values() for parameter in set(block.parameters())]
    tied = len(dict(model.named_parameters(remove_duplicate=False))) - len(dict(model.named_parameters()))
    assert set(held) == set(model.parameters())
    assert len(held) - len(set(held)) <= tied
    assert not any(name != other and name.startswith(f"{other}.") for name in blocks for other in blocks)


def test_layers_are_blocks_and_so_is_what_lies_outside_them() -> None:
    config = tiny_config("qwen3_moe")
    config.dtype = torch.float32
    layers = [f"model.layers.{number}" for number in range(config.num_hidden_layers)]
    assert list(find_blocks(meta_model(config))) == ["model.embed_tokens", *layers, "model.norm", "lm_head"]


def test_a_model_that_holds_parameters_beside_its_blocks_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])
            self.scale = nn.Parameter(torch.ones(2))

    message = r"Scaled cannot be validated block by block: it holds 'scale' beside its blocks"
    with pytest.raises(UsageError, match=message) as refused:
        find_blocks(Scaled())
    assert refused.value.hint == "validate it whole, on a machine with more memory"


class Pair(NamedTuple):
    first: Any
    second: Any


def test_tensors_are_found_and_replaced_in_any_container() -> None:
    one, two, three, four = (torch.full((2,), float(number)) for number in range(4))
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=three)
    value = {"a": [one, 5], "b": UserDict(c=(two,)), "d": Pair(output, "text"), "e": four}
    assert [float(tensor[0]) for tensor in list_tensors(value)] == [0, 1, 2, 3]
    changed: Any = replace_tensors(value, [tensor + 10 for tensor in (one, two, three, four)])
    assert [float(tensor[0]) for tensor in list_tensors(changed)] == [10, 11, 12, 13]
    assert type(changed["b"]) is UserDict
    assert type(changed["d"]) is Pair
    assert changed["d"].first.last_hidden_state is list_tensors(changed)[2]
    assert [float(tensor[0]) for tensor in list_tensors(value)] == [0, 1, 2, 3]


def test_what_a_call_puts_into_its_arguments_reaches_the_callers_containers() -> None:
    kept, new = torch.zeros(2), torch.ones(2)
    shared, listed = UserDict(old=(kept,)), [kept]
    write_back(((listed,), {"shared": shared}), (([kept, new],), {"shared": {"old": (kept,), "new": (new,)}}))
    assert listed == [kept, new]
    assert dict(shared) == {"old": (kept,), "new": (new,)}


def test_a_plain_slice_is_known_again_by_the_block_that_takes_it() -> None:
    run_on_ranks(check_slices, Mesh(tp=2))


def check_slices() -> None:
    from runtime.parallel.mesh import device_meshes

    axis = device_meshes(Mesh(tp=2), "cpu").axis("tp")
    layouts, whole = Layouts(axis), torch.arange(24.0).reshape(2, 4, 3).requires_grad_()
    rank = axis.get_local_rank()
    layout = layouts.infer(whole[:, 2 * rank : 2 * rank + 2], whole)
    assert layout == Slice(1, axis)
    given = layouts.give(whole, layout)
    assert torch.equal(given, whole[:, 2 * rank : 2 * rank + 2])
    found, again = layouts.read(given)
    assert (found, again is whole, given.requires_grad) == (layout, True, True)
    assert layouts.infer(whole[:, :3], whole) is None


def test_a_tensor_that_is_no_argument_is_refused() -> None:
    secret = torch.ones(3)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.plain = torch.ones(3)

        def forward(self, value: torch.Tensor, *, is_clean: bool) -> torch.Tensor:
            output = value * self.weight + self.plain + torch.tensor(2.0) + torch.arange(3)
            return output if is_clean else output + secret

    block, value = Block(), torch.ones(3, requires_grad=True)
    with refuse_side_channels("layers.0", block, [value]):
        block(value, is_clean=True).sum().backward()
    message = r"layers.0 cannot be validated by itself: it computes with a tensor of the shape \[3\] .* in aten.add"
    with pytest.raises(UsageError, match=message) as refused, refuse_side_channels("layers.0", block, [value]):
        block(value, is_clean=False)
    assert refused.value.hint == "validate the whole model, on a machine with more memory"


def test_only_ties_may_choose_other_experts() -> None:
    class Experts(nn.Module):
        def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            self.chosen = index
            return hidden

    model = nn.Module()
    model.experts = Experts()
    expected = Choices(torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.7, 0.3]]))
    index = torch.tensor([[1, 0], [2, 6], [4, 6]])  # the same in another order, a tie, another expert
    weights = torch.tensor([[0.4, 0.6], [0.5, 0.5 + 1e-12], [0.7, 0.2]])
    difference = RoutingDifference()
    with follow_choices(model, {"experts": expected}, 1e-6, difference):
        model.experts(torch.ones(3, 4), index, weights)
    assert (difference.wrong, difference.tied) == (1, 1)
    assert model.experts.chosen.tolist() == [[1, 0], [2, 3], [4, 6]]


def test_a_block_that_does_not_even_run_unsharded_is_refused(hub_folder: HubFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hub_folder("mixtral"), tmp_path / "hub"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 5}))
    message = (
        "model.layers.0 cannot be validated by itself: the unsharded block does not run: .*selected index k out of"
    )
    with pytest.raises(UsageError, match=message) as refused:
        run_on_ranks(lambda: by_block_cases.validate_by_block(folder), Mesh(tp=2), timeout=300)
    assert refused.value.hint == "validate the whole model, on a machine with more memory or on more ranks"


def test_a_block_without_room_is_named(hub_folder: HubFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(weights, "transfer", fail)
    with pytest.raises(UsageError, match=r"cpu has too little memory for model.embed_tokens") as refused:
        run_on_ranks(lambda: by_block_cases.validate_by_block(hub_folder("qwen2")), Mesh(tp=2), timeout=300)
    assert refused.value.hint == "use more ranks, or a machine with more memory"
