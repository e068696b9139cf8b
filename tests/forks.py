"""Copies of transformers' model folders as packages of their own, whose plans and code tests can change."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

__all__ = ["fork_model", "fork_transformers"]


def find_installed() -> Path:
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def fork_model(folder: Path, family: str, edits: Mapping[str, str] | None = None, *, name: str = "") -> Path:
    """Copy a family's configuration and modeling files into a package that imports everything else from transformers.

    Args:
        folder: where the package goes.
        family: the models folder.
        edits: texts to replace, which must all be there.
        name: the name of the package, by default the family's.

    Returns:
        The configuration file.
    """
    package = folder / (name or family)
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    missing = dict(edits or {})
    for kind in ("configuration", "modeling"):
        text = (find_installed() / "models" / family / f"{kind}_{family}.py").read_text("utf-8")
        text = re.sub(r"^(from) \.\.\.(\w)", r"\1 transformers.\2", text, flags=re.MULTILINE)
        text = re.sub(r"^(from) \.\.\. import", r"\1 transformers import", text, flags=re.MULTILINE)
        text = re.sub(r"^(from) \.\.(\w)", r"\1 transformers.models.\2", text, flags=re.MULTILINE)
        for before, after in (edits or {}).items():
            if before in text:
                text = text.replace(before, after)
                missing.pop(before, None)
        (package / f"{kind}_{family}.py").write_text(text, "utf-8")
    assert not missing, missing
    return package / f"configuration_{family}.py"


def fork_transformers(folder: Path) -> Path:
    """Make a tree of transformers whose models are copies, and everything else the installed files.

    Returns:
        The models folder.
    """
    package = folder / "transformers"
    package.mkdir(parents=True)
    for path in find_installed().iterdir():
        if path.name not in ("models", "__pycache__"):
            (package / path.name).symlink_to(path)
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(find_installed() / "models", package / "models", ignore=ignored))
