"""What the released frameworks give to modeling source: a data table, because their files are not in the tree."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

__all__ = ["FRAMEWORK_FILES", "FRAMEWORK_LEVEL", "define_base_classes", "find_alias", "is_framework_name"]

FRAMEWORK_FILES = ("configuration_utils.py", "modeling_utils.py")
"""The files beside the folder `models` by which the framework's package is known; it has all of them."""

_BASE_CLASSES = tuple(re.compile(rb"^class %s\b" % name, re.M) for name in (b"PreTrainedModel", b"Pre[Tt]rainedConfig"))

FRAMEWORK_LEVEL = 3
"""The dots of a relative import that lead from a model's file to the package of the framework itself."""

_Role = Literal["bases", "decorators"]


def define_base_classes(texts: Iterable[bytes]) -> bool:
    """Return whether some files define the base classes of all models, by which they are the framework's own."""
    wanted = set(_BASE_CLASSES)
    for text in texts:
        wanted -= {pattern for pattern in wanted if pattern.search(text)}
        if not wanted:
            return True
    return False


def find_alias(name: str) -> str:
    """Return what a name stands for that is used without an import, empty if nothing is known about it."""
    table = _load_table()
    if name in table["aliases"]:
        return str(table["aliases"][name])
    roles: tuple[_Role, ...] = ("bases", "decorators")
    return next((f"{package}.{name}" for role in roles for package, names in table[role].items() if name in names), "")


def is_framework_name(dotted: str, role: _Role | None = None) -> bool:
    """Return whether a dotted name, `transformers.modeling_utils.PreTrainedModel`, is known to have a role.

    Args:
        dotted: the name with the modules before it.
        role: the role, None for any of them.
    """
    table = _load_table()
    package, *modules, name = dotted.split(".") if "." in dotted else ("", dotted)
    if role != "decorators":
        is_plain_module = bool(modules) and modules[0] in table["modules"].get(package, ())
        if is_plain_module or package in sys.stdlib_module_names:
            return True
    roles: tuple[_Role, ...] = (role,) if role else ("bases", "decorators")
    return any(name in table[role].get(package, ()) for role in roles)


@cache
def _load_table() -> Mapping[str, Mapping[str, Sequence[str]]]:
    return tomllib.loads(Path(__file__).with_name("framework.toml").read_text("utf-8"))
