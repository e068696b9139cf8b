"""Styles of dense modules: Linear layers, embeddings, norms and the projections of latent attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from plans.placement import Packed, Shard
from runtime.extents.forms import chunk_bounds
from runtime.styles.arguments import by_place, called, with_summed_gradients
from runtime.styles.checks import (
    check_colwise,
    check_embedding,
    check_packed_colwise,
    check_partial,
    check_rope,
    check_rowwise,
    rope_width,
)
from runtime.styles.collectives import all_gather, all_reduce, all_reduce_gradient, split
from runtime.styles.facts import WITH_HEADS, Own
from runtime.styles.placements import local_tensor
from runtime.styles.sliced import gathered
from runtime.styles.style import ParallelStyle, Run, Site, expect_tensor, has_sharded, refuse

__all__ = [
    "DENSE_STYLES",
    "expect_slice",
    "own_vectors",
    "summed_parameters",
    "without_bias",
]


def colwise(site: Site, run: Run, inputs: torch.Tensor) -> torch.Tensor:
    """Whole input, output sharded by feature."""
    output: torch.Tensor = run(site.inputs.summed(gathered(inputs, site.axis), site.axis))
    return output


def colwise_gather_output(site: Site, run: Run, inputs: torch.Tensor) -> torch.Tensor:
    """Whole input, output gathered."""
    return all_gather(colwise(site, run, inputs), site.axis, _weight(site).shape[0])


def rowwise(site: Site, run: Run, inputs: torch.Tensor) -> torch.Tensor:
    """Input sharded by feature, output summed, then the whole bias added once."""
    expect_slice(site, inputs)
    with without_bias(site.module) as bias:
        output = all_reduce(run(inputs), site.axis, fresh=True)
    return output if bias is None else output + bias


def rowwise_split_input(site: Site, run: Run, inputs: torch.Tensor) -> torch.Tensor:
    """Whole input split by feature, then as `rowwise`."""
    return rowwise(site, run, split(inputs, site.axis))


def embedding_rowwise(site: Site, run: Run, tokens: torch.Tensor) -> torch.Tensor:
    """Each rank looks up the tokens of its slice of the vocabulary, zeros for the others, output summed."""
    return all_reduce(own_vectors(site, run, tokens), site.axis, fresh=True)


def own_vectors(site: Site, run: Run, tokens: torch.Tensor) -> torch.Tensor:
    """Return the vectors of the tokens in this rank's slice of the vocabulary, zeros for the others."""
    start, length = chunk_bounds(_weight(site).shape[0], site.axis.size(), site.axis.get_local_rank())
    inside = (tokens >= start) & (tokens < start + length)
    with _local_padding(cast(nn.Embedding, site.module), start, length):
        vectors = _lookup(site, run, torch.where(inside, tokens - start, 0), length)
    return vectors.masked_fill(~inside.unsqueeze(-1), 0)


def embedding_colwise(site: Site, run: Run, tokens: torch.Tensor) -> torch.Tensor:
    """Each rank looks up its slice of every vector, output gathered."""
    return all_gather(run(tokens), site.axis, _weight(site).shape[1])


def replicated_with_grad_allreduce(site: Site, run: Run, *args: object, **kwargs: object) -> object:
    """Whole parameters that only see this rank's heads: their gradients are partial and summed."""
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    with summed_parameters(site):
        return run(*args, **kwargs)


def mla_kv_a_proj(site: Site, run: Run, *args: object, **kwargs: object) -> torch.Tensor:
    """Whole output whose last slice, the rope key all heads share, is used by each rank's heads only."""
    output = expect_tensor(site, run(*args, **kwargs))
    rope = rope_width(site)
    if not rope:
        return output
    latent, shared = output[..., :-rope], output[..., -rope:]
    return torch.cat([latent, all_reduce_gradient(shared, site.axis)], dim=-1)


def sum_output(site: Site, run: Run, *args: object, **kwargs: object) -> torch.Tensor:
    """Partial output summed; inputs that the module's own sharded parameters use get their gradients summed."""
    if not has_sharded(site.module, recurse=False):
        return all_reduce(expect_tensor(site, run(*args, **kwargs)), site.axis)
    positional, named = called(with_summed_gradients(by_place(args, kwargs), site.axis), len(args))
    return all_reduce(expect_tensor(site, run(*positional, **named)), site.axis)


def local_params(site: Site, run: Run, *args: object, **kwargs: object) -> object:
    """Nothing but the module's own sharded parameters seen as local tensors."""
    return run(*args, **kwargs)


@contextmanager
def summed_parameters(site: Site) -> Iterator[None]:
    """Let a module see its whole parameters such that their gradients, partial on each rank, are summed."""
    whole = {name: value for name, value in site.module._parameters.items() if value is not None}
    summed = {name: all_reduce_gradient(value, site.axis) for name, value in whole.items()}
    site.module._parameters.update(summed)  # type: ignore[arg-type]
    try:
        yield
    finally:
        site.module._parameters.update(whole)


@contextmanager
def without_bias(module: nn.Module) -> Iterator[nn.Parameter | None]:
    """Let a Linear run without its bias, which is given to the caller."""
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
def _local_padding(module: nn.Embedding, start: int, length: int) -> Iterator[None]:
    """Count the padding token, which gets no gradient, in this rank's slice of the vocabulary."""
    padding = module.padding_idx
    local = padding - start if padding is not None and start <= padding < start + length else None
    module.padding_idx = local
    try:
        yield
    finally:
        module.padding_idx = padding


def _weight(site: Site) -> torch.Tensor:
    weight = site.parameter("weight")
    assert weight is not None, "checked before the module was hooked"
    return weight


def _lookup(site: Site, run: Run, tokens: torch.Tensor, length: int) -> torch.Tensor:
    if length:
        vectors: torch.Tensor = run(tokens)
        return vectors
    # This rank has no row to look up in, but its output must still depend on the weight: whether a tensor needs a
    # gradient decides on collectives in backward, which all ranks must call alike.
    weight = cast(DTensor, _weight(site))
    return local_tensor(weight).sum().expand(*tokens.shape, weight.shape[1])


def expect_slice(site: Site, inputs: torch.Tensor) -> None:
    """Refuse an input that is not this rank's slice; another plan entry should have left it so.

    Raises:
        PlanError: it has another width.
    """
    width = _weight(site).shape[1]
    _, length = chunk_bounds(width, site.axis.size(), site.axis.get_local_rank())
    if inputs.shape[-1] != length:
        raise refuse(
            site,
            f"whose input is {inputs.shape[-1]} wide where this rank's slice of {width} is {length}",
            hint="what computes its input needs a colwise entry, or this module rowwise_split_input",
        )


_OUT = Own(placements=(Shard(0),))
_IN = Own(placements=(Shard(1),))
_LOCAL = (WITH_HEADS, Own("linear", (Shard(1),), below_sum=True))

DENSE_STYLES = (
    ParallelStyle("colwise", colwise, check_colwise, takes="gathered", gives="features", own=(_OUT,)),
    ParallelStyle(
        "packed_colwise",
        colwise,
        check_packed_colwise,
        takes="gathered",
        gives="features",
        own=(Own(placements=(Packed(0, 2),)),),
    ),
    *(
        ParallelStyle(name, colwise_gather_output, check_colwise, takes="gathered", gives="whole", own=(_OUT,))
        for name in ("colwise_gather_output", "colwise_rep", "colwise_allgather")
    ),
    *(
        ParallelStyle(name, rowwise, check_rowwise, takes="features", gives="whole", sums="its own", own=(_IN,))
        for name in ("rowwise", "rowwise_allreduce")
    ),
    *(
        ParallelStyle(
            name, rowwise_split_input, check_rowwise, takes="whole", gives="whole", sums="its own", own=(_IN,)
        )
        for name in ("rowwise_split_input", "rowwise_rep")
    ),
    *(
        ParallelStyle(
            name,
            embedding_rowwise,
            check_embedding(Shard(0)),
            takes="whole",
            gives="whole",
            sums="its own",
            own=(_OUT,),
        )
        for name in ("embedding_rowwise", "vocab_allreduce")
    ),
    ParallelStyle(
        "embedding_colwise", embedding_colwise, check_embedding(Shard(1)), takes="whole", gives="whole", own=(_IN,)
    ),
    ParallelStyle("packed_rowwise"),
    ParallelStyle("replicate"),
    ParallelStyle("replicated_with_grad_allreduce", replicated_with_grad_allreduce),
    ParallelStyle("mla_kv_a_proj", mla_kv_a_proj, check_rope, takes="whole", gives="whole"),
    ParallelStyle(
        "all_reduce", sum_output, check_partial, gives="whole", sums="its parts", own=(Own("module", dims=(2, 3)),)
    ),
    ParallelStyle("local_params", local_params, own=_LOCAL),
)
