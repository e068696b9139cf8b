"""A process group whose ranks are threads of this process, on torch's extension point for process groups.

Each collective is carried out by the last rank that comes to it, on all ranks' tensors. On GPUs it first waits for what
every rank has queued on its current stream, and every rank's current stream then waits for the result, because callers
such as FSDP2 run collectives on streams of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ReduceOp, Work, _create_work_from_future
from torch.futures import Future

from runtime.processes.rendezvous import Call, Rendezvous

__all__ = ["build_thread_group"]

_IN_PLACE: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: Tensor.add_,
    ReduceOp.AVG: Tensor.add_,
    ReduceOp.PRODUCT: Tensor.mul_,
    ReduceOp.MIN: lambda total, other: torch.minimum(total, other, out=total),
    ReduceOp.MAX: lambda total, other: torch.maximum(total, other, out=total),
    ReduceOp.BAND: Tensor.bitwise_and_,
    ReduceOp.BOR: Tensor.bitwise_or_,
    ReduceOp.BXOR: Tensor.bitwise_xor_,
}

_Brought = tuple[Any, set[torch.device], list[torch.cuda.Event]]
"""One rank's tensors, the GPUs that they are on, and the events after which they are ready."""


def build_thread_group(rendezvous: Rendezvous, place: int, ranks: tuple[int, ...], name: str) -> dist.ProcessGroup:
    """Return one rank's view of a process group of threads.

    Args:
        rendezvous: where the ranks of the run meet.
        place: this rank's place in the group.
        ranks: the group's ranks in the world.
        name: the group's name, the same on all of its ranks.
    """
    return _ThreadGroup(rendezvous, place, ranks, name)


class _ThreadGroup(dist.ProcessGroup):
    """The methods have the names and arguments that torch calls: those of torch 2.13, and those of older ones."""

    def __init__(self, rendezvous: Rendezvous, place: int, ranks: tuple[int, ...], name: str) -> None:
        super().__init__(place, len(ranks))
        self._rendezvous = rendezvous
        self._place = place
        self._ranks = ranks
        self._size = len(ranks)
        self._key = f"{name} of {ranks}"

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._place

    def getBackendName(self) -> str:
        return "threads"

    @property
    def pg_name(self) -> str:
        name: str = dist.distributed_c10d._world.pg_names[self]
        return name

    @property
    def group_name(self) -> str:
        return self.pg_name

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        operation = _read_operation(opts)

        def run(by_rank: list[list[Tensor]]) -> None:
            for copies in zip(*by_rank, strict=True):
                total = _reduce(copies, operation)
                for copy in copies:
                    copy.copy_(total)

        return self._meet("all_reduce", f"{_name(operation)}, {_shapes(tensors)}", tensors, run)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: Any) -> Work:
        operation, root = _read_operation(opts), opts.rootRank

        def run(by_rank: list[list[Tensor]]) -> None:
            for copies in zip(*by_rank, strict=True):
                copies[root].copy_(_reduce(copies, operation))

        return self._meet("reduce", f"{_name(operation)}, dst={root}, {_shapes(tensors)}", tensors, run)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work:
        root = opts.rootRank

        def run(by_rank: list[list[Tensor]]) -> None:
            for copies in zip(*by_rank, strict=True):
                for place, copy in enumerate(copies):
                    if place != root:
                        copy.copy_(copies[root])

        return self._meet("broadcast", f"src={root}, {_shapes(tensors)}", tensors, run)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        def run(by_rank: list[tuple[list[list[Tensor]], list[Tensor]]]) -> None:
            for gathered, _ in by_rank:
                for number, row in enumerate(gathered):
                    for output, (_, given) in zip(row, by_rank, strict=True):
                        output.copy_(given[number])

        return self._meet("all_gather", _dtypes(inputs), (outputs, inputs), run)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        # Here the outer list counts ranks, and the inner one tensors.
        return self.allgather([list(row) for row in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Work:
        return self.all_gather_single_coalesced([output], [given], opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        def run(by_rank: list[tuple[list[Tensor], list[Tensor]]]) -> None:
            for gathered, _ in by_rank:
                for number, output in enumerate(gathered):
                    parts = output.view(-1).chunk(self._size)
                    for part, (_, given) in zip(parts, by_rank, strict=True):
                        part.copy_(given[number].reshape(-1))

        return self._meet("all_gather_single", _shapes(inputs), (outputs, inputs), run)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Work:
        root = opts.rootRank

        def run(by_rank: list[tuple[list[list[Tensor]], list[Tensor]]]) -> None:
            for number, row in enumerate(by_rank[root][0]):
                for output, (_, given) in zip(row, by_rank, strict=True):
                    output.copy_(given[number])

        return self._meet("gather", f"dst={root}, {_dtypes(inputs)}", (outputs, inputs), run)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        root = opts.rootRank

        def run(by_rank: list[tuple[list[Tensor], list[list[Tensor]]]]) -> None:
            for number, row in enumerate(by_rank[root][1]):
                for (received, _), given in zip(by_rank, row, strict=True):
                    received[number].copy_(given)

        return self._meet("scatter", f"src={root}, {_dtypes(outputs)}", (outputs, inputs), run)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Work:
        operation = _read_operation(opts)

        def run(by_rank: list[tuple[list[Tensor], list[list[Tensor]]]]) -> None:
            for place, (received, _) in enumerate(by_rank):
                for number, output in enumerate(received):
                    output.copy_(_reduce([given[number][place] for _, given in by_rank], operation))

        return self._meet("reduce_scatter", f"{_name(operation)}, {_dtypes(outputs)}", (outputs, inputs), run)

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Work:
        return self.reduce_scatter_single_coalesced([output], [given], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        operation = _read_operation(opts)

        def run(by_rank: list[tuple[list[Tensor], list[Tensor]]]) -> None:
            for number in range(len(outputs)):
                chunks = [given[number].reshape(-1).chunk(self._size) for _, given in by_rank]
                for place, (received, _) in enumerate(by_rank):
                    total = _reduce([chunk[place] for chunk in chunks], operation)
                    received[number].view(-1).copy_(total)

        return self._meet("reduce_scatter_single", f"{_name(operation)}, {_shapes(outputs)}", (outputs, inputs), run)

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        def run(by_rank: list[tuple[list[Tensor], list[Tensor]]]) -> None:
            for place, (received, _) in enumerate(by_rank):
                for output, (_, given) in zip(received, by_rank, strict=True):
                    output.copy_(given[place])

        return self._meet("all_to_all", _dtypes(inputs[:1]), (outputs, inputs), run)

    def all_to_all_single(
        self,
        output: Tensor,
        given: Tensor,
        output_splits: list[int] | None = None,
        input_splits: list[int] | None = None,
        opts: Any = None,
    ) -> Work:
        outputs = list(torch.split(output, _even_splits(output, output_splits, self._size)))
        inputs = list(torch.split(given, _even_splits(given, input_splits, self._size)))
        return self.alltoall(outputs, inputs)

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None) -> Work:
        return self._meet("barrier", "", None, lambda by_rank: None)

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        self.barrier()

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> Work:
        copies = [tensor.detach().clone() for tensor in tensors]
        message = copies, _record_events(_list_devices(copies))
        self._rendezvous.send(self._key, self._ranks[self._place], self._ranks[dst], tag, message)
        return _complete(tensors)

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> Work:
        received = self._rendezvous.receive(self._key, self._ranks[src], self._ranks[self._place], tag)
        copies, events = cast(tuple[list[Tensor], list[torch.cuda.Event]], received)
        _wait_for_events(events, _list_devices([*tensors, *copies]))
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.detach().copy_(copy)
        return _complete(tensors)

    def shutdown(self) -> None:
        """Do nothing: what a group holds is the run's, and goes with it."""

    abort = shutdown

    def _meet(self, name: str, detail: str, values: Any, run: Callable[[list[Any]], None]) -> Work:
        devices = _list_devices(_flatten(values))
        call = Call(name, detail, (values, devices, _record_events(devices)))
        done = self._rendezvous.meet(
            self._key, self._ranks, self._place, call, lambda by_rank: _run_on_all(by_rank, run)
        )
        _wait_for_events(done, devices)
        return _complete(_flatten(values))


def _run_on_all(by_rank: list[_Brought], run: Callable[[list[Any]], None]) -> list[torch.cuda.Event]:
    """Run a collective on all ranks' tensors; return the events that its end has on each GPU."""
    devices = set().union(*(own for _, own, _ in by_rank))
    for _, _, events in by_rank:
        _wait_for_events(events, devices)
    with torch.no_grad():
        # The outputs are written behind autograd's back, as the collectives of torch in C++ do.
        run([_detach(values) for values, _, _ in by_rank])
    return _record_events(devices)


def _record_events(devices: set[torch.device]) -> list[torch.cuda.Event]:
    return [torch.cuda.current_stream(device).record_event() for device in devices]


def _wait_for_events(events: list[torch.cuda.Event], devices: set[torch.device]) -> None:
    for device in devices:
        stream = torch.cuda.current_stream(device)
        for event in events:
            stream.wait_event(event)


def _list_devices(tensors: Sequence[Tensor]) -> set[torch.device]:
    """Return the GPUs that tensors are on."""
    return {tensor.device for tensor in tensors if tensor.device.type == "cuda"}


def _flatten(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values or () for tensor in _flatten(value)]


def _detach(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.detach()
    return None if values is None else type(values)(_detach(value) for value in values)


def _reduce(tensors: Sequence[Tensor], operation: Any) -> Tensor:
    """Reduce the tensors of all ranks in the order of the ranks, so that repeated runs agree in every bit."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        _IN_PLACE[operation](total, tensor.to(total.device))
    return total.div_(len(tensors)) if operation == ReduceOp.AVG else total


def _read_operation(opts: Any) -> Any:
    operation = ReduceOp.SUM if opts is None else getattr(opts.reduceOp, "op", opts.reduceOp)
    if operation not in _IN_PLACE:
        raise NotImplementedError(f"thread ranks cannot reduce by {operation}")
    return operation


def _name(operation: Any) -> str:
    return str(operation).rpartition(".")[2]


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors)


def _dtypes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)


def _even_splits(tensor: Tensor, splits: list[int] | None, size: int) -> list[int]:
    return list(splits) if splits else [tensor.shape[0] // size] * size


def _complete(tensors: Sequence[Tensor]) -> Work:
    """Return the handle of work that is done."""
    # The future knows its GPUs, so that whoever waits on it from another stream waits for the current one.
    future: Future[Any] = Future(devices=sorted(_list_devices(tensors), key=str))
    future.set_result(list(tensors))
    work: Work = _create_work_from_future(future)
    return work
