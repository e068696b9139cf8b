"""Styles of sequence parallelism: between attention and MLP each rank keeps a slice of the sequence only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plans.placement import Shard
from runtime.styles.checks import check_embedding, check_rowwise
from runtime.styles.collectives import all_reduce_gradient
from runtime.styles.dense import expect_slice, own_vectors, summed_parameters, without_bias
from runtime.styles.facts import WITH_HEADS, Own
from runtime.styles.sliced import SEQUENCE_DIM, cut, gathered, own_slice, scattered, sliced
from runtime.styles.style import Around, ParallelStyle, Run, Site, expect_tensor

__all__ = ["SEQUENCE_STYLES"]


def on_slices(dim: int) -> Around:
    """Return a style's forward: the module sees its rank's slice, its parameters' gradients are summed."""

    def around(site: Site, run: Run, inputs: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        with summed_parameters(site):
            output = expect_tensor(site, run(own_slice(inputs, site.axis, dim), *args, **kwargs))
            return sliced(output, site.axis, dim)

    return around


def gather_inputs(site: Site, run: Run, *args: object, **kwargs: object) -> object:
    """Whole inputs; what the module returns stays as it is."""
    whole = [_on_tensors(value, gathered, site.axis) for value in args]
    return run(*whole, **{name: _on_tensors(value, gathered, site.axis) for name, value in kwargs.items()})


def gather_and_split(site: Site, run: Run, *args: object, **kwargs: object) -> object:
    """Whole inputs, and of the whole output, or the first of several, this rank's slice."""
    tokens = next((value.shape[:-1] for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
    outputs = gather_inputs(site, run, *args, **kwargs)
    if isinstance(outputs, tuple):
        return (_split(outputs[0], tokens, site.axis), *outputs[1:])
    return _split(outputs, tokens, site.axis)


def _split(output: object, tokens: torch.Size | None, axis: DeviceMesh) -> object:
    """Return a slice of a whole output; a mixture of experts may return one row for each of the tokens."""
    if not isinstance(output, torch.Tensor) or isinstance(output, DTensor):
        return output
    if tokens is not None and output.shape[:-1] == (tokens.numel(),):
        output = output.view(*tokens, -1)
    return cut(output, axis)


def rowwise_to_sequence(site: Site, run: Run, inputs: torch.Tensor) -> torch.Tensor:
    """Input sharded by feature, output summed and scattered along the sequence, then the whole bias added."""
    expect_slice(site, inputs)
    with without_bias(site.module) as bias:
        output = scattered(run(inputs), site.axis)
    return sliced(output if bias is None else output + all_reduce_gradient(bias, site.axis), site.axis)


def vocab_to_sequence(site: Site, run: Run, tokens: torch.Tensor) -> torch.Tensor:
    """Each rank looks up its slice of the vocabulary, output summed and scattered along the sequence."""
    return sliced(scattered(own_vectors(site, run, tokens), site.axis), site.axis)


def _on_tensors(
    value: object, function: Callable[[torch.Tensor, DeviceMesh], torch.Tensor], axis: DeviceMesh
) -> object:
    return function(value, axis) if isinstance(value, (torch.Tensor, DTensor)) else value


SEQUENCE_STYLES = (
    *(
        ParallelStyle(name, on_slices(SEQUENCE_DIM), takes="sequence", gives="sequence")
        for name in ("activation", "sequence_parallel")
    ),
    ParallelStyle("activation_seq_dim_2", on_slices(SEQUENCE_DIM + 1), takes="sequence at 2", gives="sequence at 2"),
    *(
        ParallelStyle(name, gather_inputs, takes="gathered", own=(WITH_HEADS,))
        for name in ("module_allgather", "module_allgather_hidden_states")
    ),
    ParallelStyle("module_allgather_split", gather_and_split, takes="gathered", gives="sequence", own=(WITH_HEADS,)),
    ParallelStyle(
        "rowwise_reduce_scatter",
        rowwise_to_sequence,
        check_rowwise,
        takes="features",
        gives="sequence",
        sums="its own",
        own=(Own(placements=(Shard(1),)),),
    ),
    ParallelStyle(
        "vocab_reduce_scatter",
        vocab_to_sequence,
        check_embedding(Shard(0)),
        takes="whole",
        gives="sequence",
        sums="its own",
        own=(Own(placements=(Shard(0),)),),
    ),
)
