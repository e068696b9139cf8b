"""Styles of dense modules: Linear layers, embeddings, norms and the projections of latent attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plans.placement import Packed, Shard
from runtime.styles.call import index_arguments, split_arguments, sum_argument_gradients
from runtime.styles.checks import (
    build_embedding_check,
    check_colwise,
    check_packed_colwise,
    check_partial_output,
    check_rope,
    check_rowwise,
    require_rope_width,
)
from runtime.styles.collectives import all_gather, all_reduce, all_reduce_gradient, split
from runtime.styles.placements import local_tensor
from runtime.styles.sequence_slices import gather_slice
from runtime.styles.style import (
    HEAD_PARAMETERS,
    Forward,
    HookSite,
    LocalParameters,
    ParallelStyle,
    build_hook_error,
    expect_tensor,
    has_sharded_parameters,
)
from runtime.tensor_map.tensor_map import chunk_bounds

__all__ = [
    "DENSE_STYLES",
    "expect_slice",
    "look_up_local_vectors",
    "omit_bias",
    "sum_parameter_gradients",
]


def colwise(site: HookSite, run: Forward, inputs: torch.Tensor) -> torch.Tensor:
    """Run on a whole input; the output stays sharded by feature."""
    output: torch.Tensor = run(site.shared_inputs.sum_gradient(gather_slice(inputs, site.axis), site.axis))
    return output


def colwise_gather_output(site: HookSite, run: Forward, inputs: torch.Tensor) -> torch.Tensor:
    """Run on a whole input, and gather the output."""
    return all_gather(colwise(site, run, inputs), site.axis, _get_weight(site).shape[0])


def rowwise(site: HookSite, run: Forward, inputs: torch.Tensor) -> torch.Tensor:
    """Run on an input sharded by feature, sum the output over the ranks, and add the whole bias once."""
    expect_slice(site, inputs)
    with omit_bias(site.module) as bias:
        output = all_reduce(run(inputs), site.axis, may_overwrite=True)
    return output if bias is None else output + bias


def rowwise_split_input(site: HookSite, run: Forward, inputs: torch.Tensor) -> torch.Tensor:
    """Split a whole input by feature, then run as `rowwise` does."""
    return rowwise(site, run, split(inputs, site.axis))


def embedding_rowwise(site: HookSite, run: Forward, tokens: torch.Tensor) -> torch.Tensor:
    """Look up the tokens of this rank's slice of the vocabulary, zeros for the others, and sum over the ranks."""
    return all_reduce(look_up_local_vectors(site, run, tokens), site.axis, may_overwrite=True)


def look_up_local_vectors(site: HookSite, run: Forward, tokens: torch.Tensor) -> torch.Tensor:
    """Return the vectors of the tokens in this rank's slice of the vocabulary, zeros for the others.

    A norm that the embedding applies to its vectors works on this rank's tokens only, so its gradients are summed.
    """
    start, length = chunk_bounds(_get_weight(site).shape[0], site.axis.size(), site.axis.get_local_rank())
    inside = (tokens >= start) & (tokens < start + length)
    with _shift_padding_index(cast(nn.Embedding, site.module), start, length), ExitStack() as stack:
        inner = [value for part in site.module.children() for value in _sum_gradients_within(part, site.axis, stack)]
        vectors = _look_up_rows(site, run, torch.where(inside, tokens - start, 0), length, inner)
    return vectors.masked_fill(~inside.unsqueeze(-1), 0)


def embedding_colwise(site: HookSite, run: Forward, tokens: torch.Tensor) -> torch.Tensor:
    """Look up this rank's slice of every vector, and gather the output."""
    return all_gather(run(tokens), site.axis, _get_weight(site).shape[1])


def replicate_with_summed_gradients(site: HookSite, run: Forward, *args: object, **kwargs: object) -> object:
    """Run with whole parameters on this rank's heads only; their gradients, partial on each rank, are summed."""
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    with sum_parameter_gradients(site):
        return run(*args, **kwargs)


def mla_kv_a_proj(site: HookSite, run: Forward, *args: object, **kwargs: object) -> torch.Tensor:
    """Return a whole output, with the gradient of the rope key at its end summed, which each rank uses in part."""
    output = expect_tensor(site, run(*args, **kwargs))
    rope = require_rope_width(site)
    if not rope:
        return output
    latent, shared = output[..., :-rope], output[..., -rope:]
    return torch.cat([latent, all_reduce_gradient(shared, site.axis)], dim=-1)


def sum_output(site: HookSite, run: Forward, *args: object, **kwargs: object) -> torch.Tensor:
    """Sum a partial output; inputs that the module's own sharded parameters use get their gradients summed."""
    if not has_sharded_parameters(site.module, recurse=False):
        return all_reduce(expect_tensor(site, run(*args, **kwargs)), site.axis)
    positional, named = split_arguments(sum_argument_gradients(index_arguments(args, kwargs), site.axis), len(args))
    return all_reduce(expect_tensor(site, run(*positional, **named)), site.axis)


def local_params(site: HookSite, run: Forward, *args: object, **kwargs: object) -> object:
    """Run with the module's own sharded parameters as local tensors, and do nothing else."""
    return run(*args, **kwargs)


@contextmanager
def sum_parameter_gradients(site: HookSite) -> Iterator[None]:
    """Replace a module's whole parameters by tensors whose gradients, partial on each rank, are summed."""
    with _sum_own_gradients(site.module, site.axis):
        yield


@contextmanager
def _sum_own_gradients(module: nn.Module, axis: DeviceMesh) -> Iterator[list[torch.Tensor]]:
    whole = {name: value for name, value in module._parameters.items() if value is not None}
    summed = {name: all_reduce_gradient(value, axis) for name, value in whole.items()}
    module._parameters.update(summed)  # type: ignore[arg-type]
    try:
        yield list(summed.values())
    finally:
        module._parameters.update(whole)


def _sum_gradients_within(module: nn.Module, axis: DeviceMesh, stack: ExitStack) -> list[torch.Tensor]:
    """Replace the parameters of a module and of all in it, until the stack is left; return what stands for them."""
    return [value for part in module.modules() for value in stack.enter_context(_sum_own_gradients(part, axis))]


@contextmanager
def omit_bias(module: nn.Module) -> Iterator[nn.Parameter | None]:
    """Take the bias out of a Linear and yield it, None if there is none."""
    bias = module._parameters.get("bias")
    if bias is None:
        yield None
        return
    module._parameters["bias"] = None
    try:
        yield bias
    finally:
        module._parameters["bias"] = bias


@contextmanager
def _shift_padding_index(module: nn.Embedding, start: int, length: int) -> Iterator[None]:
    """Move the padding index, whose row gets no gradient, into this rank's slice of the vocabulary."""
    padding = module.padding_idx
    local = padding - start if padding is not None and start <= padding < start + length else None
    module.padding_idx = local
    try:
        yield
    finally:
        module.padding_idx = padding


def _get_weight(site: HookSite) -> torch.Tensor:
    weight = site.parameter("weight")
    assert weight is not None, "checked before the module was hooked"
    return weight


def _look_up_rows(
    site: HookSite, run: Forward, tokens: torch.Tensor, length: int, inner: Sequence[torch.Tensor]
) -> torch.Tensor:
    if length:
        vectors: torch.Tensor = run(tokens)
        return vectors
    # This rank has no row to look up, but its output must still depend on all parameters: whether a tensor needs a
    # gradient decides which collectives backward calls, and all ranks must call the same.
    weight = cast(DTensor, _get_weight(site))
    total = sum((value.sum() for value in inner), start=local_tensor(weight).sum())
    return total.expand(*tokens.shape, weight.shape[1])


def expect_slice(site: HookSite, inputs: torch.Tensor) -> None:
    """Check that an input is this rank's slice, as another plan entry should have left it.

    Raises:
        PlanError: it has another width.
    """
    width = _get_weight(site).shape[1]
    _, length = chunk_bounds(width, site.axis.size(), site.axis.get_local_rank())
    if inputs.shape[-1] != length:
        raise build_hook_error(
            site,
            f"whose input is {inputs.shape[-1]} wide, while this rank's slice of {width} is {length} wide",
            hint="use colwise for the layer that computes its input, or rowwise_split_input for this one",
        )


_OUTPUT_SHARDED = LocalParameters(placements=(Shard(0),))
_INPUT_SHARDED = LocalParameters(placements=(Shard(1),))
_LOCAL_PARAMETERS = (HEAD_PARAMETERS, LocalParameters("linear", (Shard(1),), below_sum=True))

DENSE_STYLES = (
    ParallelStyle("colwise", colwise, check_colwise, takes="gathered", gives="features", own=(_OUTPUT_SHARDED,)),
    ParallelStyle(
        "packed_colwise",
        colwise,
        check_packed_colwise,
        takes="gathered",
        gives="features",
        own=(LocalParameters(placements=(Packed(0, 2),)),),
    ),
    *(
        ParallelStyle(
            name, colwise_gather_output, check_colwise, takes="gathered", gives="whole", own=(_OUTPUT_SHARDED,)
        )
        for name in ("colwise_gather_output", "colwise_rep", "colwise_allgather")
    ),
    *(
        ParallelStyle(
            name, rowwise, check_rowwise, takes="features", gives="whole", sums="its own", own=(_INPUT_SHARDED,)
        )
        for name in ("rowwise", "rowwise_allreduce")
    ),
    *(
        ParallelStyle(
            name,
            rowwise_split_input,
            check_rowwise,
            takes="whole",
            gives="whole",
            sums="its own",
            own=(_INPUT_SHARDED,),
        )
        for name in ("rowwise_split_input", "rowwise_rep")
    ),
    *(
        ParallelStyle(
            name,
            embedding_rowwise,
            build_embedding_check(Shard(0)),
            takes="whole",
            gives="whole",
            sums="its own",
            own=(_OUTPUT_SHARDED,),
        )
        for name in ("embedding_rowwise", "vocab_allreduce")
    ),
    ParallelStyle(
        "embedding_colwise",
        embedding_colwise,
        build_embedding_check(Shard(1)),
        takes="whole",
        gives="whole",
        own=(_INPUT_SHARDED,),
    ),
    ParallelStyle("packed_rowwise"),
    ParallelStyle("replicate"),
    ParallelStyle("replicated_with_grad_allreduce", replicate_with_summed_gradients),
    ParallelStyle("mla_kv_a_proj", mla_kv_a_proj, check_rope, takes="whole", gives="whole"),
    ParallelStyle(
        "all_reduce",
        sum_output,
        check_partial_output,
        gives="whole",
        sums="its parts",
        own=(LocalParameters("module", dims=(2, 3)),),
    ),
    ParallelStyle("local_params", local_params, own=_LOCAL_PARAMETERS),
)
