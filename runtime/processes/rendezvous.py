"""Where the thread ranks of one run take turns and meet: collectives, messages, deadlocks.

One rank runs at a time, until it must wait for another. Much of torch and transformers changes what is one per process,
such as tracing modes and random generators, and would mix up ranks that ran at once; taking turns also makes every
run the same in every bit. Ranks of tiny models would hardly gain by running at once, since Python holds them apart.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from plans.errors import WorkerError

__all__ = ["Call", "EndedRun", "Rendezvous", "format_ranks"]

Result = TypeVar("Result")

_LISTED_RANKS = 8


class EndedRun(BaseException):
    """Raised in the ranks that are left when a run has failed; it is no Exception, so that no rank handles it."""


@dataclass(frozen=True)
class Call:
    """One rank's call of a collective.

    Args:
        name: the collective, as torch names it.
        detail: what every rank of the group must pass alike: the reduction, the root, the shapes.
        values: what this rank brings.
    """

    name: str
    detail: str
    values: Any

    @property
    def text(self) -> str:
        """The call as errors show it."""
        return f"{self.name}({self.detail})"


@dataclass
class _Meeting:
    """One collective: the calls of the ranks that have come, by their place in the group, and its result."""

    calls: dict[int, Call] = field(default_factory=dict)
    result: Any = None


class Rendezvous:
    """The turns, meetings and messages of one run.

    A run fails as a whole: the first failure is kept, and every rank that waits or comes later gets EndedRun.

    Args:
        world_size: the number of ranks.
        save: returns the state of the process that each rank has for itself.
        restore: sets that state.
    """

    def __init__(self, world_size: int, save: Callable[[], Any], restore: Callable[[Any], None]) -> None:
        self.world_size = world_size
        self.failure: BaseException | None = None
        self._is_symptom = False
        self._save, self._restore = save, restore
        self._start = save()
        self._lock = threading.Lock()
        self._turns = [threading.Event() for _ in range(world_size)]
        self._ready = deque(range(world_size))
        self._waits: dict[int, str] = {}
        self._left: set[int] = set()
        self._meetings: dict[tuple[str, int], _Meeting] = {}
        self._counts: dict[tuple[str, int], int] = defaultdict(int)
        self._messages: dict[tuple[str, int, int, int], deque[object]] = defaultdict(deque)
        self._receivers: set[tuple[str, int, int, int]] = set()
        self._pass_turn()

    def begin(self, rank: int) -> None:
        """Wait for a rank's first turn.

        Raises:
            EndedRun: the run has failed.
        """
        self._take_turn(rank, self._start)

    def leave(self, rank: int) -> None:
        """Give up the turn for good; ranks that wait for this one now wait forever, which ends the run."""
        with self._lock:
            self._left.add(rank)
            self._pass_turn()

    def meet(
        self, group: str, ranks: Sequence[int], place: int, call: Call, run: Callable[[list[Any]], Result]
    ) -> Result:
        """Wait until every rank of a group has made the same call; the last to come runs it for all.

        Args:
            group: the name of the process group.
            ranks: the group's ranks in the world.
            place: the calling rank's place among them.
            call: the call.
            run: takes the values of all ranks, in the group's order.

        Returns:
            What `run` returned, on every rank.

        Raises:
            EndedRun: the run has failed, perhaps through this call.
        """
        rank = ranks[place]
        key = group, self._counts[group, rank]
        self._counts[group, rank] += 1
        meeting = self._meetings.setdefault(key, _Meeting())
        meeting.calls[place] = call
        missing = [one for index, one in enumerate(ranks) if index not in meeting.calls]
        if missing:
            self._wait(rank, f"{call.text} with {format_ranks(missing)}")
        else:
            del self._meetings[key]
            if differing := _describe_difference(meeting, ranks):
                with self._lock:
                    self._fail(
                        WorkerError(differing, hint="make the same calls in the same order on every rank"),
                        is_symptom=True,
                    )
                raise EndedRun
            meeting.result = run([meeting.calls[index].values for index in range(len(ranks))])
            self._wake(one for one in ranks if one != rank)
        result: Result = meeting.result
        return result

    def send(self, group: str, sender: int, receiver: int, tag: int, message: object) -> None:
        """Leave a message for another rank; it need not be waiting yet."""
        key = group, sender, receiver, tag
        self._messages[key].append(message)
        if key in self._receivers:
            self._receivers.remove(key)
            self._wake([receiver])

    def receive(self, group: str, sender: int, receiver: int, tag: int) -> object:
        """Wait for a message of another rank.

        Raises:
            EndedRun: the run has failed.
        """
        key = group, sender, receiver, tag
        if not self._messages[key]:
            self._receivers.add(key)
            self._wait(receiver, f"recv of rank {sender} with tag {tag}")
        return self._messages[key].popleft()

    def fail(self, failure: BaseException) -> None:
        """End the run with a failure, unless it has one already.

        A rank's own error explains why ranks wait for each other or disagree, and takes the place of that failure.
        """
        with self._lock:
            self._fail(failure, is_symptom=False)

    def list_waits(self) -> dict[int, str]:
        """Return what each rank that does not run waits for."""
        with self._lock:
            return self._waits | dict.fromkeys(self._ready, "waits for its turn")

    def _wait(self, rank: int, text: str) -> None:
        """Give up the turn until another rank wakes this one and its next turn comes."""
        state = self._save()
        with self._lock:
            self._waits[rank] = text
            self._pass_turn()
        self._take_turn(rank, state)

    def _wake(self, ranks: Iterable[int]) -> None:
        with self._lock:
            for rank in ranks:
                del self._waits[rank]
                self._ready.append(rank)

    def _take_turn(self, rank: int, state: object) -> None:
        self._turns[rank].wait()
        self._turns[rank].clear()
        if self.failure is not None:
            raise EndedRun
        self._restore(state)

    def _pass_turn(self) -> None:
        """Let the next rank run; if every rank waits or has finished, nobody is left to end a wait."""
        if self._ready:
            self._turns[self._ready.popleft()].set()
        elif self._waits:
            self._fail(
                WorkerError(
                    f"the ranks wait for each other: {_describe_waits(self._waits, self._left)}",
                    hint="make the same calls in the same order on every rank",
                    waits={str(rank): text for rank, text in sorted(self._waits.items())},
                ),
                is_symptom=True,
            )

    def _fail(self, failure: BaseException, *, is_symptom: bool) -> None:
        if self.failure is None or (self._is_symptom and not is_symptom):
            self.failure, self._is_symptom = failure, is_symptom
        for turn in self._turns:
            turn.set()


def _describe_difference(meeting: _Meeting, ranks: Sequence[int]) -> str | None:
    """Describe the calls of a meeting where they are not the same on every rank."""
    texts = {ranks[place]: call.text for place, call in sorted(meeting.calls.items())}
    return f"ranks of one group disagree: {_join_ranks(texts)}" if len(set(texts.values())) > 1 else None


def _describe_waits(waits: Mapping[int, str], left: set[int]) -> str:
    return _join_ranks({**dict(sorted(waits.items())), **dict.fromkeys(sorted(left), "finished")})


def _join_ranks(texts: Mapping[int, str]) -> str:
    """Return texts of ranks in one line, those with the same text together."""
    by_text: dict[str, list[int]] = defaultdict(list)
    for rank, text in texts.items():
        by_text[text].append(rank)
    return "; ".join(f"{format_ranks(ranks)}: {text}" for text, ranks in by_text.items())


def format_ranks(ranks: Iterable[int]) -> str:
    """Return ranks as text: `rank 3`, `ranks 0, 1, 2`, or the first of many and their number."""
    listed = list(ranks)
    names = ", ".join(str(rank) for rank in listed[:_LISTED_RANKS])
    more = f" and {len(listed) - _LISTED_RANKS} more" if len(listed) > _LISTED_RANKS else ""
    return f"rank{'s' if len(listed) > 1 else ''} {names}{more}"
