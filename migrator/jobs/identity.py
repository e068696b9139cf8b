"""What a step is: its options, the versions that matter and its sources; by it a done step is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from migrator.jobs.files import Stamps, files_below, stamps
from migrator.jobs.state import Record
from migrator.jobs.values import Check, Job, Reshard, Rewrite, Step, Validate, Verify

__all__ = ["Identity", "identity_of", "located", "product_of", "why_run"]

_HUB = "hf://"
_MANNER = frozenset(("max_memory", "timeout", "overwrite"))
"""Options that say how a step works and not what comes of it."""
_SOURCES: Mapping[type, tuple[str, ...]] = {
    Reshard: ("source",),
    Verify: ("source", "other"),
    Validate: ("source", "reference"),
}
_PACKAGES: Mapping[type, tuple[str, ...]] = dict.fromkeys(_SOURCES, ("torch", "transformers"))
_FILES_OF = "files of "
_UNFINISHED = {"failed": "it failed", "stopped": "it was stopped", "started": "its run was killed"}


@dataclass(frozen=True)
class Identity:
    """What a step is.

    Args:
        options: by name.
        versions: of the packages that decide what it does.
        sources: stamps of the files that it reads, by what they belong to.
    """

    options: Mapping[str, object]
    versions: Mapping[str, str | None]
    sources: Mapping[str, Stamps]

    @property
    def meaning(self) -> Mapping[str, object]:
        """Everything by name, as the state file keeps it; where it is the same, so is the step."""
        read = {f"{_FILES_OF}{name}": _digest(found) for name, found in self.sources.items()}
        plain: dict[str, object] = json.loads(json.dumps({**self.options, **self.versions, **read}, default=str))
        return plain

    def after_writing(self, files: Iterable[Path]) -> Identity:
        """Return the identity when the step itself has changed some of its sources; others' changes still count."""
        written = stamps(files)
        sources = {name: {**found, **_among(written, found)} for name, found in self.sources.items()}
        return replace(self, sources=sources)


def identity_of(step: Step) -> Identity:
    """Return what a step is now; sources on the hub are fetched for it.

    Raises:
        MigratorError: a source on the hub cannot be fetched, or a path holds nothing to read.
    """
    options = {one.name: getattr(step, one.name) for one in fields(step) if one.name not in _MANNER}
    versions = {name: _version(name) for name in ("plan-migrator", *_PACKAGES.get(type(step), ()))}
    match step:
        case Rewrite() | Check():
            sources = {"the tree": stamps(_tree(step.paths))}
        case _:
            named = [text for name in _SOURCES[type(step)] if (text := getattr(step, name)) is not None]
            sources = {text: stamps(files_below(located(text))) for text in named}
    return Identity(options, versions, sources)


def located(source: str) -> Path:
    """Return a checkpoint's folder, fetched from the hub where it lies there.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    if not source.startswith(_HUB):
        return Path(source)
    from runtime.hub import local_folder

    return local_folder(source, quiet=True)


def product_of(job: Job, name: str, step: Step) -> str | None:
    """Return the digest of the stamps of what a step writes, None where there is nothing of it."""
    files = files_below(step.destination) if isinstance(step, Reshard) else (job.result(name), job.patch(name))
    found = stamps(files)
    return _digest(found) if found else None


def why_run(record: Record | None, identity: Identity, product: str | None) -> str | None:
    """Return why a step is to be run, None where it is done.

    Args:
        record: what is remembered of it.
        identity: what it is now.
        product: what there is now of what it wrote.
    """
    if record is None:
        return "it was not run yet"
    if changes := list(_changes(record.meaning, identity.meaning)):
        return "; ".join(changes)
    if not record.is_done:
        return _UNFINISHED[record.status]
    return None if product == record.product else "what it wrote is no longer there, or was changed"


def _changes(before: Mapping[str, object], now: Mapping[str, object]) -> Iterator[str]:
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) != now.get(name):
            is_files = name.startswith(_FILES_OF)
            yield f"{name} changed" if is_files else f"{name} was {before.get(name)} and is {now.get(name)}"


def _tree(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the files that a look at source reads: those below the paths, of models beside, and configurations."""
    from codemods.config import find_project_file
    from codemods.detect import version_file
    from codemods.sources import find_sources
    from codemods.survey import is_model_path

    models = [path for path in paths if is_model_path(path)]
    beside = [path.parent.parent if path.is_file() else path.parent for path in models]
    yield from find_sources([*paths, *beside], [])
    for look in (find_project_file, version_file):
        yield from filter(None, dict.fromkeys(look(path.resolve()) for path in paths))


def _among(written: Stamps, known: Stamps) -> Stamps:
    return {path: stamp for path, stamp in written.items() if path in known}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digest(found: Stamps) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
