"""Other people's rank files as a job's source: what its settings say of them, and the files that they name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from migrator.foreign_options import ForeignOptions
from migrator.jobs import readers
from migrator.jobs.readers import Reader
from migrator.jobs.values import Reshard, Verify

__all__ = ["FOREIGN", "as_settings", "files_of", "foreign_of"]

FOREIGN: Mapping[str, Reader] = {
    "from_pattern": readers.text,
    "from_tp": readers.size,
    "from_ep": readers.size,
    "from_mode": readers.choice("tp", "ep", "tp_ep"),
    "plan": readers.path,
    "config": readers.path,
}
"""The settings, by the names of the steps' fields."""
_OPTION = re.compile(r"--(?=[a-z])")
_CONFIG = "config.json"


def foreign_of(step: Reshard | Verify) -> ForeignOptions:
    """Return what a step says of its source's files, as the commands take it."""
    return ForeignOptions(*(getattr(step, name) for name in FOREIGN))


def files_of(step: object) -> tuple[Path, ...]:
    """Return the files besides a step's checkpoints that it reads: the plan, and the one config of a folder of them."""
    if not isinstance(step, Reshard | Verify):
        return ()
    config = step.config / _CONFIG if step.config is not None and step.config.is_dir() else step.config
    return tuple(path for path in (step.plan, config) if path is not None)


def as_settings(text: str) -> str:
    """Return what is said of a command's options with the names that they have in job files."""
    return _OPTION.sub("", text)
