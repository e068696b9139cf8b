"""Dialects in files of the user's own: the vocabulary of a fork, in the schema of the files under `plans/dialects/`.

A fork's file usually extends a dialect that ships with migrator and adds what the fork registers. Everything in it is
checked when it is read, because a wrong placement or meaning would be carried into every plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from plans.dialect import Dialect, build_dialect, dialect_names, load_dialect
from plans.errors import UsageError
from plans.named_file import read_named_toml
from plans.text import suggest_name
from plans.translate import load_meanings

__all__ = ["is_dialect_file", "list_dialect_files", "load_named_dialect", "read_dialect_file"]

_TOP_LEVEL = ("name", "releases", "stage", "extends", "removed", "numbered_keys")
_EXPERT_PLANS = ("expert_plan_needs", "expert_plan_refuses")
_STYLE_KEYS = ("job", "does", "output", "placements", "means", "only", "alias_of")
_PLACEMENT_KEYS = ("place", "owner", "rank", "parameter")
_JOBS = ("parameter", "module", "both")
_OUTPUTS = ("whole", "sharded")
_OWNERS = ("linear", "embedding", "module")
_KINDS_OF_PLANS = ("tp", "sp", "ep")
_PLACE = re.compile(r"replicate|shard -?\d|packed -?\d [1-9]\d*")
_RELEASE = re.compile(r"\d+\.\d+")
_NAME = re.compile(r"[\w.+-]+")
_MAX_BASES = 32  # files that extend each other
_PARAMETER = re.compile(r"parameter(?: \d|, a bias)")
_MODULES = ("linear", "embedding", "module", "experts", "expert-parallel", "unsharded experts")


def is_dialect_file(name: str) -> bool:
    """Return whether the name of a dialect is the path of a file."""
    return name.endswith(".toml") or "/" in name or "\\" in name


def load_named_dialect(name: str) -> Dialect:
    """Return the dialect of a name, or the one in the file of that path.

    Raises:
        UsageError: there is no such dialect, or the file cannot be read or breaks the schema.
    """
    return read_dialect_file(Path(name)) if is_dialect_file(name) else load_dialect(name)


def read_dialect_file(path: Path) -> Dialect:
    """Read a dialect from a file and check it against the schema.

    Raises:
        UsageError: the file cannot be read, is not valid TOML or breaks the schema.
    """
    return _read_file(path, ())


def list_dialect_files(name: str) -> list[Path]:
    """Return the files that a dialect file is made of: itself and those that it extends, if they can be read."""
    files: list[Path] = []
    while is_dialect_file(name) and (path := Path(name)) not in files:
        files.append(path)
        try:
            base = _parse_file(path).get("extends")
        except UsageError:
            break
        name = str(path.parent / base) if isinstance(base, str) and is_dialect_file(base) else ""
    return files


def _read_file(path: Path, extending: tuple[Path, ...]) -> Dialect:
    """Read a file that the files `extending` lead to, each the base of the one before it."""
    document = _parse_file(path)
    _Checker(path).check_document(document)
    document = {"name": path.stem, **document}

    def load_base(name: str) -> Dialect:
        if not is_dialect_file(name):
            return load_dialect(name)
        base = path.parent / name
        if len(extending) >= _MAX_BASES:
            _refuse(
                path, "extends", f"is the base of more than {_MAX_BASES} files", "put their styles into fewer files"
            )
        if base.resolve() in (path.resolve(), *extending):
            _refuse(path, "extends", f"leads back to {base}", "let it name a dialect that does not extend this one")
        return _read_file(base, (*extending, path.resolve()))

    # Read once: read for every question, each file of a chain would double the work of those before it.
    base = load_base(document["extends"]) if "extends" in document else None
    dialect = build_dialect(document, lambda name: base or load_base(name))
    _check_references(path, document, dialect, base)
    if dialect.name in dialect_names() and dialect != load_dialect(dialect.name):
        problem = f"is {dialect.name!r}, the name of a dialect that ships with migrator and differs from this one"
        _refuse(path, "name", problem, 'give it another: name = "…"')
    return dialect


def _parse_file(path: Path) -> Mapping[str, Any]:
    return read_named_toml(path, "name a TOML file, or one of the dialects " + ", ".join(dialect_names()))


def _refuse(path: Path, key: str, problem: str, hint: str) -> NoReturn:
    raise UsageError(f"{path}: {key} {problem}", hint=hint, path=str(path), key=key)


@dataclass(frozen=True)
class _Checker:
    """Checks the values of one file; each method raises UsageError for the first value that breaks the schema."""

    path: Path

    def check_document(self, document: Mapping[str, Any]) -> None:
        self._check_keys("", document, (*_TOP_LEVEL, *_EXPERT_PLANS, "styles"))
        self._check_values(
            "",
            document,
            {
                "name": self._check_name,
                "releases": self._check_releases,
                "stage": self._check_size,
                "extends": self._check_base,
                "removed": self._check_texts,
                "numbered_keys": self._check_flag,
                "expert_plan_needs": self._check_needs,
                "expert_plan_refuses": self._check_texts,
                "styles": self._check_styles,
            },
        )

    def _check_styles(self, key: str, value: object) -> None:
        for name, row in self._read_table(key, value).items():
            self._check_name(f"{key}.{name}", name)
            self._check_style(f"{key}.{name}", self._read_table(f"{key}.{name}", row))

    def _check_style(self, key: str, row: Mapping[str, Any]) -> None:
        self._check_keys(key, row, _STYLE_KEYS)
        for required, example in (("job", '"parameter"'), ("does", '"nothing"'), ("means", "{}")):
            if required not in row:
                _refuse(self.path, key, f"has no `{required}`", f"add for example {required} = {example}")
        self._check_values(
            key,
            row,
            {
                "job": self._choose(_JOBS),
                "does": self._check_text,
                "output": self._choose(_OUTPUTS),
                "placements": self._check_placements,
                "means": self._check_meanings,
                "only": self._choose(_KINDS_OF_PLANS),
                "alias_of": self._check_text,
            },
        )
        if row["job"] == "module" and row.get("placements"):
            _refuse(self.path, f"{key}.placements", "places parameters, but a module style shards none", 'job = "both"')

    def _check_placements(self, key: str, value: object) -> None:
        if not isinstance(value, list):
            _refuse(
                self.path, key, f"is {value!r}, not a list of tables", f'write {_leaf(key)} = [{{ place = "shard 0" }}]'
            )
        for index, item in enumerate(value):
            row = self._read_table(f"{key}[{index}]", item)
            self._check_keys(f"{key}[{index}]", row, _PLACEMENT_KEYS)
            if not isinstance(row.get("place"), str) or not _PLACE.fullmatch(row["place"]):
                problem = f"is {row['place']!r}, not a placement" if "place" in row else "is missing"
                _refuse(self.path, f"{key}[{index}].place", problem, "write replicate, shard DIM or packed DIM GROUPS")
            self._check_values(
                f"{key}[{index}]",
                row,
                {"owner": self._choose(_OWNERS), "rank": self._check_size, "parameter": self._check_text},
            )

    def _check_meanings(self, key: str, value: object) -> None:
        meanings = load_meanings()
        for target, meaning in self._read_table(key, value).items():
            where = f"{key}.{target}"
            if target not in _MODULES and not _PARAMETER.fullmatch(target):
                kinds = ", ".join((*_MODULES, "parameter RANK"))
                _refuse(self.path, where, "is not a kind of thing that a key can name", f"choose among {kinds}")
            if not isinstance(meaning, str) or meaning not in meanings:
                fitting = [name for name, facts in meanings.items() if _is_on(facts.on, target)]
                hint = suggest_name(str(meaning), fitting, "choose among " + ", ".join(fitting))
                _refuse(self.path, where, f"is {meaning!r}, which is no meaning", hint)
            if not _is_on(meanings[meaning].on, target):
                fitting = [name for name, facts in meanings.items() if _is_on(facts.on, target)]
                hint = "choose among " + ", ".join(fitting)
                _refuse(self.path, where, f"is {meaning!r}, a meaning on {meanings[meaning].on}", hint)

    def _check_keys(self, key: str, table: Mapping[str, Any], known: Collection[str]) -> None:
        unknown = next((name for name in table if name not in known), None)
        if unknown is not None:
            hint = suggest_name(unknown, known, "keys are " + ", ".join(known))
            _refuse(self.path, ".".join(filter(None, (key, unknown))), "is not a key of a dialect file", hint)

    def _check_values(
        self, key: str, table: Mapping[str, Any], checks: Mapping[str, Callable[[str, object], None]]
    ) -> None:
        for name, check in checks.items():
            if name in table:
                check(".".join(filter(None, (key, name))), table[name])

    def _read_table(self, key: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            _refuse(self.path, key, f"is {value!r}, not a table", f"write [{key}]")
        return value

    def _choose(self, choices: Collection[str]) -> Callable[[str, object], None]:
        def check(key: str, value: object) -> None:
            if value not in choices:
                hint = suggest_name(str(value), choices, "choose among " + ", ".join(choices))
                _refuse(self.path, key, f"is {value!r}", hint)

        return check

    def _check_text(self, key: str, value: object) -> None:
        if not isinstance(value, str):
            _refuse(self.path, key, f"is {value!r}, not a string", f'write {_leaf(key)} = "…"')

    def _check_texts(self, key: str, value: object) -> None:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            _refuse(self.path, key, f"is {value!r}, not a list of strings", f'write {_leaf(key)} = ["…"]')

    def _check_needs(self, key: str, value: object) -> None:
        if not isinstance(value, list):
            _refuse(self.path, key, f"is {value!r}, not a list of lists", f'write {_leaf(key)} = [["…"]]')
        for item in value:
            self._check_texts(key, item)

    def _check_name(self, key: str, value: object) -> None:
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            _refuse(self.path, key, f"is {value!r}, not a name", "use letters, digits, `_`, `-`, `+` and `.` only")

    def _check_releases(self, key: str, value: object) -> None:
        self._check_texts(key, value)
        assert isinstance(value, list)
        if wrong := next((text for text in value if not _RELEASE.fullmatch(text)), None):
            _refuse(self.path, key, f"contains {wrong!r}, not a minor version", 'write it as "5.23"')

    def _check_size(self, key: str, value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            _refuse(self.path, key, f"is {value!r}, not a whole number", f"write for example {_leaf(key)} = 2")

    def _check_flag(self, key: str, value: object) -> None:
        if not isinstance(value, bool):
            _refuse(self.path, key, f"is {value!r}, not true or false", f"write {_leaf(key)} = true")

    def _check_base(self, key: str, value: object) -> None:
        self._check_text(key, value)
        assert isinstance(value, str)
        if not is_dialect_file(value) and value not in dialect_names():
            hint = suggest_name(value, dialect_names(), "choose among " + ", ".join(dialect_names()))
            _refuse(self.path, key, f"is {value!r}, which is no dialect", hint)


def _check_references(path: Path, document: Mapping[str, Any], dialect: Dialect, extended: Dialect | None) -> None:
    """Check that the file's lists name styles that exist, and that it has any."""
    base = extended.styles if extended else {}
    needed = [name for need in document.get("expert_plan_needs", ()) for name in need]
    _check_known(path, "removed", document.get("removed", ()), base)
    _check_known(path, "expert_plan_needs", needed, dialect.styles)
    _check_known(path, "expert_plan_refuses", document.get("expert_plan_refuses", ()), {*base, *dialect.styles})
    for name, row in document.get("styles", {}).items():
        _check_known(path, f"styles.{name}.alias_of", filter(None, [row.get("alias_of")]), dialect.styles)
    if not dialect.styles:
        _refuse(path, "styles", "is empty: the dialect has no style", 'add [styles.NAME] tables, or extends = "…"')


def _check_known(path: Path, key: str, names: Iterable[str], known: Collection[str]) -> None:
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        hint = suggest_name(unknown, known, "styles are " + (", ".join(sorted(known)) or "none"))
        _refuse(path, key, f"names {unknown!r}, which is no style here", hint)


def _is_on(kind: str, target: str) -> bool:
    """Return whether a meaning on a kind of thing can be that of a target; any module may be left as it is."""
    if target.startswith("parameter"):
        return kind == "parameter"
    return kind == target or kind == "module"


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]
