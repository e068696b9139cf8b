"""The sizes of tiny models, from the data file beside this module and from files of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from plans.errors import UsageError
from plans.named_file import read_named_toml
from plans.text import suggest_name

__all__ = ["Sizes", "load_sizes", "read_sizes"]

_FILE = Path(__file__).with_name("sizes.toml")
_INPUTS = ("tokens", "embeddings")
_TABLES = ("largest", "divided", "classes", "variants", "inputs")
_DIVIDED = ("heads", "tp", "ep", "rows")

_Values = Mapping[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What a tiny model of a config class is made with.

    Args:
        largest: by field, the value that a class gets whose default is larger.
        divided: the fields that tensor parallelism divides, `heads` in common and `tp` each by itself, those that
            expert parallelism does, `ep`, and those that tensor parallelism shares out unevenly, `rows`.
        classes: by class, the fields that it needs besides.
        variants: by class and by what is different about it, the fields of another shape of the class.
        inputs: by class, what its model takes; a class that is not named takes tokens.
    """

    largest: Mapping[str, int]
    divided: Mapping[str, Sequence[str]]
    classes: Mapping[str, _Values]
    variants: Mapping[str, Mapping[str, _Values]]
    inputs: Mapping[str, str]

    def extend(self, other: Sizes) -> Sizes:
        """Return these sizes with another file's in their place, field by field."""
        divided = {
            kind: [*self.divided.get(kind, ()), *other.divided.get(kind, ())]
            for kind in self.divided.keys() | other.divided.keys()
        }
        names = self.classes.keys() | other.classes.keys()
        classes = {name: {**self.classes.get(name, {}), **other.classes.get(name, {})} for name in names}
        names = self.variants.keys() | other.variants.keys()
        variants = {name: {**self.variants.get(name, {}), **other.variants.get(name, {})} for name in names}
        return Sizes({**self.largest, **other.largest}, divided, classes, variants, {**self.inputs, **other.inputs})

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@cache
def load_sizes() -> Sizes:
    """Return the sizes that come with migrator."""
    return read_sizes(_FILE)


def read_sizes(path: Path) -> Sizes:
    """Read a file of sizes.

    Raises:
        UsageError: the file cannot be read, is not TOML, or has a table or a value of another form.
    """
    document = read_named_toml(path, "name a file of sizes in TOML")
    for name in document.keys() - set(_TABLES):
        _refuse(path, name, "is not a table of sizes", suggest_name(name, _TABLES, f"tables are {', '.join(_TABLES)}"))
    tables = {name: _check_table(path, name, document.get(name, {})) for name in _TABLES}
    for name, size in tables["largest"].items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            _refuse(path, f"largest.{name}", "is not a size", "write a number of 1 or more")
    for kind, fields in tables["divided"].items():
        if kind not in _DIVIDED or not isinstance(fields, list) or not all(isinstance(one, str) for one in fields):
            _refuse(path, f"divided.{kind}", "is not a list of fields", f"lists are {', '.join(_DIVIDED)}")
    for name, values in tables["classes"].items():
        _check_table(path, f"classes.{name}", values)
    for name, variants in tables["variants"].items():
        for difference, values in _check_table(path, f"variants.{name}", variants).items():
            _check_table(path, f"variants.{name}.{difference}", values)
    for name, taken in tables["inputs"].items():
        if taken not in _INPUTS:
            _refuse(path, f"inputs.{name}", f"is {taken!r}", f"write one of {', '.join(_INPUTS)}")
    return Sizes(**tables)


def _check_table(path: Path, key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(path, key, "is not a table", f"write [{key}]")
    return value


def _refuse(path: Path, key: str, problem: str, hint: str) -> NoReturn:
    raise UsageError(f"{path}: {key} {problem}", hint=hint, path=str(path), key=key)
