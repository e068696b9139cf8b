"""Job files: TOML of which every key is known and every value has its kind."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from migrator.jobs import readers
from migrator.jobs.files import read_regular
from migrator.jobs.foreign import FOREIGN, as_settings, foreign_of
from migrator.jobs.places import check_places
from migrator.jobs.readers import Place, Reader
from migrator.jobs.values import Check, Job, Reshard, Rewrite, Step, Validate, Verify
from plans.alike import did_you_mean
from plans.errors import UsageError
from plans.mesh import MODES, Mesh

__all__ = ["job_files", "read"]

_LARGEST = 1_000_000
_DEFAULT_NAME = "checkpoint"

_AXES: Mapping[str, Reader] = {
    **dict.fromkeys(("tp", "ep", "fsdp"), readers.size),
    "mode": readers.choice(*MODES),
}
_TREE: Mapping[str, Reader] = {"paths": readers.paths, "source": readers.text, "target": readers.text}
_KEYS: Mapping[str, Mapping[str, Reader]] = {
    "": {"output": readers.path},
    "rewrite": {**_TREE, "verify": readers.flag, "in_place": readers.flag},
    "check": _TREE,
    "reshard": {
        "name": readers.name,
        "source": readers.checkpoint,
        "destination": readers.path,
        **_AXES,
        "layout": readers.choice("hf", "dcp", "ranks"),
        "experts": readers.choice("fused", "separate"),
        "optimizer": readers.flag,
        "max_memory": readers.size,
        "overwrite": readers.flag,
        "push_to": readers.text,
        **FOREIGN,
    },
    "verify": {"source": readers.checkpoint, "other": readers.checkpoint, "max_memory": readers.size, **FOREIGN},
    "validate": {
        "source": readers.checkpoint,
        "reference": readers.checkpoint,
        **_AXES,
        "device": readers.choice("cpu", "cuda", "auto"),
        "tolerance": readers.fraction,
        "timeout": readers.seconds,
    },
}
"""What may be written in each table, and at the top."""
_STEPS = tuple(filter(None, _KEYS))
_LISTED = ", ".join(f"[{name}]" for name in _STEPS)

_Options = dict[str, Any]


def read(file: Path) -> Job:
    """Read a job file; paths in it are relative to its folder, and of what it names only links are looked at.

    Args:
        file: in TOML.

    Raises:
        UsageError: it cannot be read, is not TOML, has a key or value that no job has, with its line, or puts
            something where something else goes or lies.
    """
    file = file.absolute()
    content = _content(file)
    top = Place(file, content)
    try:
        tables = tomllib.loads(content)
    except (ValueError, RecursionError) as error:  # of numbers with thousands of digits, a plain ValueError
        raise UsageError(f"{file}: is not TOML: {error}", hint="mend the file", path=str(file)) from error
    plain = {key: value for key, value in tables.items() if key not in _STEPS}
    output = _options(top, plain).get("output", file.with_suffix(".job"))
    found = {name: list(_tables(replace(top, table=name), tables[name])) for name in _STEPS if name in tables}
    steps = dict(_steps(top, output, found))
    if not steps:
        raise UsageError(f"{file}: declares no step", hint=f"add one of {_LISTED}", path=str(file))
    job = Job(file, output, steps)
    check_places(job)
    return job


def job_files(path: Path) -> tuple[Path, ...]:
    """Return the job files that a path names: itself, or those of a folder by their names.

    Raises:
        UsageError: there is no such file, or none in the folder.
    """
    if not path.is_dir():
        return (path,)
    try:
        found = sorted(one for one in path.iterdir() if one.suffix == ".toml" and not one.name.startswith("."))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="make it a readable folder", path=str(path)) from error
    if not found:
        raise UsageError(f"{path}: holds no job file", hint="job files end with .toml", path=str(path))
    return tuple(found)


def _content(file: Path) -> str:
    try:
        return read_regular(file, _LARGEST, follows=True).decode()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}", hint="name a job file in TOML", path=str(file)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: is not UTF-8: {error}", hint="mend the file", path=str(file)) from error


def _tables(place: Place, value: object) -> Iterator[tuple[Place, _Options]]:
    """Yield the tables of one name, of which only `reshard` may have several."""
    is_several = place.table == "reshard" and isinstance(value, list)
    for number, table in enumerate(value if isinstance(value, list) and is_several else [value]):
        here = replace(place, number=number)
        if not isinstance(table, dict):
            here.refuse("is no table", f"write [{place.table}]")
        yield here, _options(here, table)


def _options(place: Place, table: Mapping[str, object]) -> _Options:
    """Return what a table says; a name of several words may have `-` in it, as options have, or `_`."""
    known = _KEYS[place.table]
    options: _Options = {}
    for key, value in table.items():
        here, name = replace(place, key=key), key.replace("-", "_")
        if name not in known:
            tables = () if place.table else _STEPS
            allowed = ", ".join(known) + (f", and the tables {_LISTED}" if tables else "")
            here.refuse("is no setting", did_you_mean(name, (*known, *tables), f"settings here are {allowed}"))
        if name in options:
            here.refuse("is there twice", "write it once, with `-` or with `_`")
        options[name] = known[name](here, value)
    return options


def _steps(
    top: Place, output: Path, found: Mapping[str, Sequence[tuple[Place, _Options]]]
) -> Iterator[tuple[str, Step]]:
    """Yield the steps that are declared, what they leave out filled in from the steps before."""
    only = {name: tables[0] for name, tables in found.items()}
    targets = dict(_targets(output, found.get("reshard", ())))
    if rewriting := only.get("rewrite"):
        yield "rewrite", Rewrite(**_needing("paths", *rewriting))
    if checking := only.get("check"):
        yield "check", Check(**_needing("paths", checking[0], {**_tree_of(rewriting), **checking[1]}))
    for suffix, target in targets.items():
        yield f"reshard{suffix}", target
    for suffix, options in _each(only.get("verify"), targets, _verified):
        verifying = Verify(**options)
        _check_foreign(only["verify"][0], verifying)
        yield f"verify{suffix}", verifying
    for suffix, options in _each(only.get("validate"), targets, _validated):
        yield f"validate{suffix}", Validate(**options)


def _tree_of(rewriting: tuple[Place, _Options] | None) -> _Options:
    return {key: value for key, value in rewriting[1].items() if key in _TREE} if rewriting else {}


def _targets(output: Path, tables: Sequence[tuple[Place, _Options]]) -> Iterator[tuple[str, Reshard]]:
    """Yield what is resharded to, each by what its steps' names end with."""
    names: set[str] = set()
    for place, options in tables:
        name = options.pop("name", None)
        known = name or _DEFAULT_NAME
        if known in names:
            place.refuse(f"has the name {known!r} of another", "give each a `name` of its own")
        names.add(known)
        options.setdefault("destination", output / known)
        _check_mesh(place, options)
        target = Reshard(**_needing("source", place, options))
        _check_foreign(place, target)
        yield f"-{name}" if name else "", target


def _check_mesh(place: Place, options: _Options) -> None:
    try:
        Mesh(**{axis: options[axis] for axis in ("tp", "ep", "fsdp") if axis in options})
    except UsageError as error:
        place.refuse(f"makes up no mesh: {error}", error.hint)


def _check_foreign(place: Place, step: Reshard | Verify) -> None:
    try:
        foreign_of(step).checked(step.source)
    except UsageError as error:
        place.refuse(f"does not say how to read its source: {as_settings(str(error))}", as_settings(error.hint))


def _each(
    table: tuple[Place, _Options] | None,
    targets: Mapping[str, Reshard],
    about: Callable[[Reshard, _Options], _Options],
) -> Iterator[tuple[str, _Options]]:
    """Yield a step's options for every result of resharding, unless they name a checkpoint themselves."""
    if table is None:
        return
    place, options = table
    if "source" in options or not targets:
        yield "", _needing("source", place, options)
        return
    for suffix, target in targets.items():
        yield suffix, about(target, options)


def _verified(target: Reshard, options: _Options) -> _Options:
    """Hold a result against its source; another stack's rank files can be read as the first of two only."""
    result = str(target.destination)
    if target.from_pattern is None or "other" in options:
        return {"other": target.source, **options, "source": result}
    said = {name: getattr(target, name) for name in FOREIGN}
    return {**said, **options, "source": target.source, "other": result}


def _validated(target: Reshard, options: _Options) -> _Options:
    """Hold a result against its source; no model is made of another stack's rank files."""
    reference = {} if target.from_pattern is not None else {"reference": target.source}
    return {**reference, **options, "source": str(target.destination)}


def _needing(key: str, place: Place, options: _Options) -> _Options:
    if key not in options:
        place.refuse(f"does not say its `{key}`", f"write {key} = … below [{place.table}]")
    return options
