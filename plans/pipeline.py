"""Pipeline stages: which layers of a model each of them holds, by the release of transformers."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from plans.dialect import parse_minor

__all__ = ["PipelineSplit", "find_split", "split_layers"]

_FILE = Path(__file__).with_name("pipeline.toml")

Remainder = Literal["first", "last"]


@dataclass(frozen=True)
class PipelineSplit:
    """How releases of transformers split layers over pipeline stages.

    Args:
        since: the first release that does it so.
        remainder: which stages have the layers that an even split leaves over: the `last` stage all of them, or the
            `first` stages one each.
        tensor_parallel: whether a stage can be a tensor parallel group, or only one rank.
    """

    since: str
    remainder: Remainder
    tensor_parallel: bool


@cache
def _load_splits() -> Sequence[PipelineSplit]:
    """Return all known splits, the oldest first."""
    return [PipelineSplit(**row) for row in tomllib.loads(_FILE.read_text("utf-8"))["splits"]]


def find_split(version: str) -> PipelineSplit | None:
    """Return how a release splits layers, None if it has no pipeline stages.

    Args:
        version: the release's version, such as `5.24.0`; one newer than all that are known splits as the newest does.
    """
    minor = parse_minor(version)
    return next((split for split in reversed(_load_splits()) if parse_minor(split.since) <= minor), None)


def split_layers(count: int, stages: int, remainder: Remainder) -> list[range]:
    """Return the numbers of the layers that each stage holds.

    Args:
        count: the number of layers.
        stages: the number of stages.
        remainder: which stages have the layers that an even split leaves over.
    """
    each, left = divmod(count, stages)
    sizes = [each + (stage < left) for stage in range(stages)] if remainder == "first" else [each] * stages
    sizes[-1] += count - sum(sizes)
    return [range(sum(sizes[:stage]), sum(sizes[: stage + 1])) for stage in range(stages)]
