"""Commands of the `runtime` extra: the packages they need, looked for before anything is imported."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

from plans.errors import DependencyError

__all__ = ["require_runtime"]

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")


def require_runtime(*, show_downloads: bool = False) -> None:
    """Make the runtime's packages importable without a word of theirs on the terminal.

    Args:
        show_downloads: let the hub's client show its progress, which it does on a terminal.

    Raises:
        DependencyError: one is not installed.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"this command needs {missing[0]}, which is not installed",
            hint="pip install 'plan-migrator[runtime]'",
            packages=missing,
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not show_downloads:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")
