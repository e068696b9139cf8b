"""Models built with parameters on meta, which take no memory, and with real buffers."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn

from runtime.find_config import find_config
from runtime.models.model import init_on_meta, meta_model

LARGE = 2**24 + 2


class Filled(nn.Module):
    """Parameters filled with zeros, ones and scaled random numbers, and a small buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros = nn.Parameter(torch.zeros(2**16, 2**20))
        self.scaled = nn.Parameter(0.5 * torch.randn(2**16, 2**20))
        self.small = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.ones(3))


class LargeBuffer(nn.Module):
    """A buffer as large as the parameter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(LARGE))
        self.register_buffer("table", torch.full((LARGE,), 3, dtype=torch.int8))


class Mixed(nn.Module):
    """A large tensor that the constructor reads, which meta could not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 2))
        self.register_buffer("total", torch.tensor(torch.ones(LARGE, dtype=torch.int8).sum().item()))


class Broken(nn.Module):
    """A class that refuses its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.zeros(LARGE, dtype=torch.int8)
        raise ValueError("no such size")


def test_filled_parameters_take_no_memory() -> None:
    """The two large parameters have 128 GiB each."""
    model = init_on_meta(Filled, torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert model.table.tolist() == [1, 1, 1]


def test_a_large_buffer_keeps_its_values() -> None:
    model = init_on_meta(LargeBuffer, None)
    assert model.weight.is_meta
    assert model.table.min() == model.table.max() == 3


def test_a_constructor_that_reads_a_large_tensor_gets_a_real_one() -> None:
    model = init_on_meta(Mixed, None)
    assert model.weight.is_meta
    assert model.total == LARGE


def test_an_error_of_the_class_is_raised() -> None:
    with pytest.raises(ValueError, match="no such size"):
        init_on_meta(Broken, None)


def test_the_default_dtype_is_restored() -> None:
    init_on_meta(Filled, torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_a_real_model_of_200_gb_is_built_in_little_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = meta_model(find_config("llama4_text"))
    assert sum(parameter.nbytes for parameter in model.parameters()) > 2e11
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


class Initialized(nn.Module):
    """Initializes a parameter and a buffer as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        self.register_buffer("noise", torch.zeros(4))
        self.returned = [
            nn.init.normal_(self.weight),
            nn.init.uniform_(tensor=self.weight),
            nn.init.normal_(self.noise),
        ]


def test_what_is_real_is_initialized() -> None:
    model = init_on_meta(Initialized, None)
    assert model.weight.is_meta
    assert [tensor is model.weight for tensor in model.returned] == [True, True, False]
    assert model.noise.count_nonzero() == 4
