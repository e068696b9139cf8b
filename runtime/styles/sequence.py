"""Styles of sequence parallelism: between attention and MLP each rank holds only its slice of the sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plans.placement import Shard
from runtime.styles.checks import build_embedding_check, check_rowwise
from runtime.styles.collectives import all_reduce_gradient
from runtime.styles.dense import expect_slice, look_up_local_vectors, omit_bias, sum_parameter_gradients
from runtime.styles.sequence_slices import (
    SEQUENCE_DIM,
    gather_slice,
    reduce_scatter_slice,
    shard_activation,
    take_local_slice,
    wrap_slice,
)
from runtime.styles.style import (
    HEAD_PARAMETERS,
    Forward,
    ForwardHook,
    HookSite,
    LocalParameters,
    ParallelStyle,
    expect_tensor,
)

__all__ = ["SEQUENCE_STYLES"]


def build_slice_hook(dim: int) -> ForwardHook:
    """Return a hook that runs a module on this rank's slice, with the gradients of its parameters summed.

    Args:
        dim: the dim of the activations that is the sequence.
    """

    def around(site: HookSite, run: Forward, inputs: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        with sum_parameter_gradients(site):
            output = expect_tensor(site, run(take_local_slice(inputs, site.axis, dim), *args, **kwargs))
            return wrap_slice(output, site.axis, dim)

    return around


def gather_inputs(site: HookSite, run: Forward, *args: object, **kwargs: object) -> object:
    """Gather the inputs; the output stays as the module returns it."""
    whole = [_apply_to_tensor(value, gather_slice, site.axis) for value in args]
    return run(*whole, **{name: _apply_to_tensor(value, gather_slice, site.axis) for name, value in kwargs.items()})


def gather_and_split(site: HookSite, run: Forward, *args: object, **kwargs: object) -> object:
    """Gather the inputs, and return this rank's slice of the output, or of the first of several outputs."""
    tokens = next((value.shape[:-1] for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
    outputs = gather_inputs(site, run, *args, **kwargs)
    if isinstance(outputs, tuple):
        return (_split_output(outputs[0], tokens, site.axis), *outputs[1:])
    return _split_output(outputs, tokens, site.axis)


def _split_output(output: object, tokens: torch.Size | None, axis: DeviceMesh) -> object:
    """Return this rank's slice of a whole output; a mixture of experts may return one row for each token."""
    if not isinstance(output, torch.Tensor) or isinstance(output, DTensor):
        return output
    if tokens is not None and output.shape[:-1] == (tokens.numel(),):
        output = output.view(*tokens, -1)
    return shard_activation(output, axis)


def rowwise_reduce_scatter(site: HookSite, run: Forward, inputs: torch.Tensor) -> torch.Tensor:
    """Run on an input sharded by feature, sum the output, scatter it along the sequence, and add the whole bias."""
    expect_slice(site, inputs)
    with omit_bias(site.module) as bias:
        output = reduce_scatter_slice(run(inputs), site.axis)
    return wrap_slice(output if bias is None else output + all_reduce_gradient(bias, site.axis), site.axis)


def vocab_reduce_scatter(site: HookSite, run: Forward, tokens: torch.Tensor) -> torch.Tensor:
    """Look up the tokens of this rank's slice of the vocabulary, sum the output, scatter it along the sequence."""
    return wrap_slice(reduce_scatter_slice(look_up_local_vectors(site, run, tokens), site.axis), site.axis)


def _apply_to_tensor(
    value: object, function: Callable[[torch.Tensor, DeviceMesh], torch.Tensor], axis: DeviceMesh
) -> object:
    return function(value, axis) if isinstance(value, (torch.Tensor, DTensor)) else value


SEQUENCE_STYLES = (
    *(
        ParallelStyle(name, build_slice_hook(SEQUENCE_DIM), takes="sequence", gives="sequence")
        for name in ("activation", "sequence_parallel")
    ),
    ParallelStyle(
        "activation_seq_dim_2", build_slice_hook(SEQUENCE_DIM + 1), takes="sequence at 2", gives="sequence at 2"
    ),
    *(
        ParallelStyle(name, gather_inputs, takes="gathered", own=(HEAD_PARAMETERS,))
        for name in ("module_allgather", "module_allgather_hidden_states")
    ),
    ParallelStyle(
        "module_allgather_split", gather_and_split, takes="gathered", gives="sequence", own=(HEAD_PARAMETERS,)
    ),
    ParallelStyle(
        "rowwise_reduce_scatter",
        rowwise_reduce_scatter,
        check_rowwise,
        takes="features",
        gives="sequence",
        sums="its own",
        own=(LocalParameters(placements=(Shard(1),)),),
    ),
    ParallelStyle(
        "vocab_reduce_scatter",
        vocab_reduce_scatter,
        build_embedding_check(Shard(0)),
        takes="whole",
        gives="sequence",
        sums="its own",
        own=(LocalParameters(placements=(Shard(0),)),),
    ),
)
