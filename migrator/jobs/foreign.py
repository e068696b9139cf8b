"""Other people's rank files as a job's source: what its settings say of them, and the files that they name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from migrator.foreign_options import ExternalOptions
from migrator.jobs import readers
from migrator.jobs.readers import SettingReader
from migrator.jobs.values import Reshard, Verify

__all__ = ["EXTERNAL_SETTINGS", "get_external_options", "list_external_files", "replace_option_names"]

EXTERNAL_SETTINGS: Mapping[str, SettingReader] = {
    "from_pattern": readers.read_text,
    "from_tp": readers.read_size,
    "from_ep": readers.read_size,
    "from_mode": readers.make_choice_reader("tp", "ep", "tp_ep"),
    "plan": readers.read_path,
    "config": readers.read_path,
}
"""The settings, by the names of the steps' fields."""
_OPTION_PREFIX = re.compile(r"--(?=[a-z])")
_CONFIG = "config.json"


def get_external_options(step: Reshard | Verify) -> ExternalOptions:
    """Return what a step says of its source's files, as the commands take it."""
    return ExternalOptions(*(getattr(step, name) for name in EXTERNAL_SETTINGS))


def list_external_files(step: object) -> tuple[Path, ...]:
    """Return the files besides a step's checkpoints that it reads: the plan, and the one config of a folder of them."""
    if not isinstance(step, Reshard | Verify):
        return ()
    config = step.config / _CONFIG if step.config is not None and step.config.is_dir() else step.config
    return tuple(path for path in (step.plan, config) if path is not None)


def replace_option_names(text: str) -> str:
    """Return what is said of a command's options with the names that they have in job files."""
    return _OPTION_PREFIX.sub("", text)
