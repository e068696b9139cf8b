"""Read job files: TOML in which every key must be known and every value of the right kind."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from migrator.jobs import readers
from migrator.jobs.files import read_regular_file
from migrator.jobs.job import Job, Step
from migrator.jobs.path_conflicts import check_path_conflicts
from migrator.jobs.readers import (
    EXTERNAL_SETTINGS,
    SettingLocation,
    SettingReader,
)
from migrator.options.external import check_external_options
from migrator.settings import Check, Prove, Reshard, Rewrite, Validate, Verify
from plans.errors import UsageError
from plans.mesh import AXES, MODES, Mesh
from plans.text import suggest_name

__all__ = ["job_files", "read"]

_MAX_BYTES = 1_000_000
_DEFAULT_NAME = "checkpoint"

_MESH_SETTINGS: Mapping[str, SettingReader] = {
    **dict.fromkeys(AXES, readers.read_size),
    "mode": readers.make_choice_reader(*MODES),
}
_TREE_SETTINGS: Mapping[str, SettingReader] = {
    "paths": readers.read_paths,
    "source": readers.read_dialect_name,
    "target": readers.read_dialect_name,
}
_SETTINGS: Mapping[str, Mapping[str, SettingReader]] = {
    "": {"output": readers.read_output},
    "rewrite": {**_TREE_SETTINGS, "verify": readers.read_flag, "in_place": readers.read_flag},
    "check": _TREE_SETTINGS,
    "prove": {
        "paths": readers.read_paths,
        "installed": readers.read_flag,
        "experts_only": readers.read_flag,
        **dict.fromkeys(("tp", "ep", "fsdp", "replicate"), readers.read_size),
        "mode": readers.make_choices_reader(*MODES),
        "config": readers.read_path,
        "sizes": readers.read_path,
        "timeout": readers.read_seconds,
        "max_memory": readers.read_size,
    },
    "reshard": {
        "name": readers.read_name,
        "source": readers.read_checkpoint_name,
        "destination": readers.read_output,
        **_MESH_SETTINGS,
        "layout": readers.make_choice_reader("hf", "dcp", "ranks"),
        "experts": readers.make_choice_reader("fused", "separate"),
        "optimizer": readers.read_flag,
        "max_memory": readers.read_size,
        "overwrite": readers.read_flag,
        "push_to": readers.read_text,
        "follow_links": readers.read_flag,
        **EXTERNAL_SETTINGS,
    },
    "verify": {
        "source": readers.read_checkpoint_name,
        "other": readers.read_checkpoint_name,
        "max_memory": readers.read_size,
        "follow_links": readers.read_flag,
        "digests": readers.read_path,
        **EXTERNAL_SETTINGS,
    },
    "validate": {
        "source": readers.read_checkpoint_name,
        "reference": readers.read_checkpoint_name,
        **_MESH_SETTINGS,
        "device": readers.make_choice_reader("cpu", "cuda", "auto"),
        "tolerance": readers.read_fraction,
        "timeout": readers.read_seconds,
        "plan": readers.read_path,
        "allow_unexercised": readers.read_texts,
        "ranks": readers.make_choice_reader("auto", "processes", "threads"),
        "follow_links": readers.read_flag,
        "by_block": readers.read_flag,
        "digests": readers.read_path,
    },
}
"""The settings of each table, and of the top level under the empty name."""
_STEP_NAMES = tuple(filter(None, _SETTINGS))
_STEP_TABLES = ", ".join(f"[{name}]" for name in _STEP_NAMES)

_Options = dict[str, Any]


def read(file: Path) -> Job:
    """Read a job file. Paths in it are relative to its folder; their links are resolved, but none needs to exist.

    Args:
        file: the job file, in TOML.

    Raises:
        UsageError: it cannot be read, is not TOML, has an unknown key or a wrong value, or two of its paths conflict.
    """
    file = file.absolute()
    content = _read_content(file)
    top = SettingLocation(file, content)
    try:
        tables = tomllib.loads(content)
    except (ValueError, RecursionError) as error:  # A number with thousands of digits is a plain ValueError.
        raise UsageError(f"{file}: is not TOML: {error}", hint="correct the file", path=str(file)) from error
    plain = {key: value for key, value in tables.items() if key not in _STEP_NAMES}
    output = _read_options(top, plain).get("output", file.with_suffix(".job"))
    steps_tables = {
        name: list(_read_tables(replace(top, table=name), tables[name])) for name in _STEP_NAMES if name in tables
    }
    steps = dict(_build_steps(top, output, steps_tables))
    if not steps:
        raise UsageError(f"{file}: declares no step", hint=f"add one of {_STEP_TABLES}", path=str(file))
    job = Job(file, output, steps)
    check_path_conflicts(job)
    return job


def job_files(path: Path) -> tuple[Path, ...]:
    """Return the job files that a path names: the path itself, or the job files of a folder, sorted by name.

    Raises:
        UsageError: the folder cannot be read, or contains no job file.
    """
    if not path.is_dir():
        return (path,)
    try:
        files = sorted(file for file in path.iterdir() if file.suffix == ".toml" and not file.name.startswith("."))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="make it a readable folder", path=str(path)) from error
    if not files:
        raise UsageError(f"{path}: contains no job file", hint="job files end with .toml", path=str(path))
    return tuple(files)


def _read_content(file: Path) -> str:
    try:
        return read_regular_file(file, _MAX_BYTES, follow_links=True).decode()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}", hint="name a job file in TOML", path=str(file)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: is not UTF-8: {error}", hint="correct the file", path=str(file)) from error


def _read_tables(location: SettingLocation, value: object) -> Iterator[tuple[SettingLocation, _Options]]:
    """Yield the tables of one name; only `reshard` may have several."""
    is_several = location.table == "reshard" and isinstance(value, list)
    for number, table in enumerate(value if isinstance(value, list) and is_several else [value]):
        here = replace(location, number=number)
        if not isinstance(table, dict):
            here.refuse("is not a table", f"write [{location.table}]")
        yield here, _read_options(here, table)


def _read_options(location: SettingLocation, table: Mapping[str, object]) -> _Options:
    """Return the settings of a table; keys may have `-`, as command-line options do, or `_`."""
    known = _SETTINGS[location.table]
    options: _Options = {}
    for key, value in table.items():
        here, name = replace(location, key=key), key.replace("-", "_")
        if name not in known:
            tables = () if location.table else _STEP_NAMES
            allowed = ", ".join(known) + (f", and the tables {_STEP_TABLES}" if tables else "")
            here.refuse("is not a setting", suggest_name(name, (*known, *tables), f"settings here are {allowed}"))
        if name in options:
            here.refuse("is given twice", "write it once, with `-` or with `_`")
        options[name] = known[name](here, value)
    return options


def _build_steps(
    top: SettingLocation, output: Path, tables_by_name: Mapping[str, Sequence[tuple[SettingLocation, _Options]]]
) -> Iterator[tuple[str, Step]]:
    """Yield the declared steps, with omitted settings filled in from earlier steps."""
    only = {name: tables[0] for name, tables in tables_by_name.items()}
    targets = dict(_build_reshards(output, tables_by_name.get("reshard", ())))
    if rewriting := only.get("rewrite"):
        yield "rewrite", Rewrite(**_require_option("paths", *rewriting))
    if checking := only.get("check"):
        yield (
            "check",
            Check(**_require_option("paths", checking[0], {**_select_tree_options(rewriting), **checking[1]})),
        )
    if proving := only.get("prove"):
        yield "prove", _build_prove(*proving, _select_tree_options(rewriting))
    for suffix, target in targets.items():
        yield f"reshard{suffix}", target
    for suffix, options in _expand_per_target(only.get("verify"), targets, _build_verify_options):
        verifying = Verify(**options)
        _check_external_options(only["verify"][0], verifying)
        yield f"verify{suffix}", verifying
    for suffix, options in _expand_per_target(only.get("validate"), targets, _build_validate_options):
        yield f"validate{suffix}", Validate(**options)


def _build_prove(location: SettingLocation, options: _Options, tree: _Options) -> Prove:
    """Build the step, which takes the paths of the rewrite unless it has others or takes what is installed."""
    if not options.get("installed"):
        options = _require_option("paths", location, {**{key: tree[key] for key in tree if key == "paths"}, **options})
    return Prove(**options)


def _select_tree_options(rewriting: tuple[SettingLocation, _Options] | None) -> _Options:
    return {key: value for key, value in rewriting[1].items() if key in _TREE_SETTINGS} if rewriting else {}


def _build_reshards(output: Path, tables: Sequence[tuple[SettingLocation, _Options]]) -> Iterator[tuple[str, Reshard]]:
    """Yield the reshard steps by the suffix that names their verify and validate steps too."""
    names: set[str] = set()
    for place, options in tables:
        name = options.pop("name", None)
        known = name or _DEFAULT_NAME
        if known in names:
            place.refuse(f"has the same name as another, {known!r}", "give each a `name` of its own")
        names.add(known)
        options.setdefault("destination", output / known)
        _check_mesh(place, options)
        target = Reshard(**_require_option("source", place, options))
        _check_external_options(place, target)
        yield f"-{name}" if name else "", target


def _check_mesh(location: SettingLocation, options: _Options) -> None:
    try:
        Mesh(**{axis: options[axis] for axis in AXES if axis in options})
    except UsageError as error:
        location.refuse(f"is not a valid mesh: {error}", error.hint)


def _check_external_options(location: SettingLocation, step: Reshard | Verify) -> None:
    try:
        check_external_options(step, step.source)
    except UsageError as error:
        location.refuse(f"does not say how to read its source: {error}", error.hint)


def _expand_per_target(
    table: tuple[SettingLocation, _Options] | None,
    targets: Mapping[str, Reshard],
    build_options: Callable[[Reshard, _Options], _Options],
) -> Iterator[tuple[str, _Options]]:
    """Yield a step's options for the result of each reshard step, unless they name a `source` themselves."""
    if table is None:
        return
    place, options = table
    if "source" in options or not targets:
        yield "", _require_option("source", place, options)
        return
    for suffix, target in targets.items():
        yield suffix, build_options(target, options)


def _build_verify_options(target: Reshard, options: _Options) -> _Options:
    """Compare a result with its source; another stack's rank files can only be read as `source`, not as `other`."""
    result = str(target.destination)
    if target.from_pattern is None or "other" in options:
        return {"other": target.source, **options, "source": result}
    external = {name: getattr(target, name) for name in EXTERNAL_SETTINGS}
    return {**external, **options, "source": target.source, "other": result}


def _build_validate_options(target: Reshard, options: _Options) -> _Options:
    """Compare a result with its source, unless that is another stack's rank files, which validation cannot load."""
    reference = {} if target.from_pattern is not None else {"reference": target.source}
    return {**reference, **options, "source": str(target.destination)}


def _require_option(key: str, location: SettingLocation, options: _Options) -> _Options:
    if key not in options:
        location.refuse(f"needs `{key}`", f"write {key} = … below [{location.table}]")
    return options
