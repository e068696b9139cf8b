"""What a step is: its options, the versions that matter and its sources; by it a done step is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from migrator.jobs.files import Stamps, collect_stamps, is_regular_file, list_files
from migrator.jobs.job import Job, Step, is_on_hub
from migrator.jobs.readers import list_external_files
from migrator.jobs.state import Record, Records
from migrator.options.common import require_runtime
from migrator.settings import Check, Reshard, Rewrite, Validate, Verify

__all__ = [
    "CacheKey",
    "StepState",
    "check_up_to_date",
    "compute_product_digest",
    "find_source_checkpoints",
    "locate_checkpoint",
]

_EXECUTION_OPTIONS = frozenset(("max_memory", "timeout", "overwrite"))
"""Options that say how a step works and not what comes of it."""
_SOURCES: Mapping[type, tuple[str, ...]] = {
    Reshard: ("source",),
    Verify: ("source", "other"),
    Validate: ("source", "reference"),
}
_PACKAGES: Mapping[type, tuple[str, ...]] = dict.fromkeys(_SOURCES, ("torch", "transformers"))
_FILES_PREFIX = "files of "
_UNFINISHED = {"failed": "it failed", "stopped": "it was stopped", "started": "its run was killed"}


@dataclass(frozen=True)
class CacheKey:
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
    def fingerprint(self) -> Mapping[str, object]:
        """Everything by name, as the state file keeps it; where it is the same, so is the step."""
        read = {f"{_FILES_PREFIX}{name}": _digest_stamps(found) for name, found in self.sources.items()}
        plain: dict[str, object] = json.loads(json.dumps({**self.options, **self.versions, **read}, default=str))
        return plain

    def after_writing(self, files: Iterable[Path]) -> CacheKey:
        """Return the identity when the step itself has changed some of its sources; others' changes still count."""
        written = collect_stamps(files)
        sources = {name: {**found, **_select_known(written, found)} for name, found in self.sources.items()}
        return replace(self, sources=sources)


@dataclass(frozen=True)
class StepState:
    """How things stand with a step.

    Args:
        cache_key: what it is now.
        why: it is to be run, None where it is done.
        is_own_output: whether nothing is at its destination but what this job wrote there and nobody touched.
    """

    cache_key: CacheKey
    why: str | None
    is_own_output: bool


def check_up_to_date(job: Job, records: Records, name: str, step: Step) -> StepState:
    """Look whether a step is done; sources on the hub are fetched for it.

    Args:
        job: of the step.
        records: what is remembered of the job.
        name: of the step.
        step: with its options.

    Raises:
        MigratorError: a source on the hub cannot be fetched, or a path holds nothing to read.
    """
    if type(step) in _SOURCES:
        require_runtime()
    identity, record, product = _build_cache_key(step), records.get(name), compute_product_digest(job, name, step)
    why = _find_run_reason(record, identity, product)
    if why is None and not all(map(is_regular_file, _list_result_files(job, name, step))):
        why = "its result or report is no longer there"
    return StepState(
        identity, why, record is not None and record.product is not None and product in (None, record.product)
    )


def find_source_checkpoints(step: Step) -> tuple[str, ...]:
    """Return the checkpoints that a step reads: folders, and names on the hub."""
    named = (getattr(step, name) for name in _SOURCES.get(type(step), ()))
    return tuple(text for text in named if text is not None)


def _build_cache_key(step: Step) -> CacheKey:
    options = {one.name: getattr(step, one.name) for one in fields(step) if one.name not in _EXECUTION_OPTIONS}
    versions = {name: _find_version(name) for name in ("plan-migrator", *_PACKAGES.get(type(step), ()))}
    match step:
        case Rewrite() | Check():
            verifies = isinstance(step, Rewrite) and step.verify
            sources = {"the tree": collect_stamps(_list_tree_files(step.paths, verifies=verifies))}
        case _:
            sources = {
                text: collect_stamps(list_files(locate_checkpoint(text))) for text in find_source_checkpoints(step)
            }
            sources |= {str(file): collect_stamps([file]) for file in list_external_files(step)}
    return CacheKey(options, versions, sources)


def locate_checkpoint(source: str) -> Path:
    """Return a checkpoint's folder, fetched from the hub where it lies there.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    if not is_on_hub(source):
        return Path(source)
    from runtime.hub import resolve_folder

    return resolve_folder(source, quiet=True)


def compute_product_digest(job: Job, name: str, step: Step) -> str | None:
    """Return the digest of the stamps of what a step writes, None where there is nothing of it."""
    told = (job.result(name), job.patch(name), job.report(name))
    found = collect_stamps(list_files(step.destination) if isinstance(step, Reshard) else told)
    return _digest_stamps(found) if found else None


def _list_result_files(job: Job, name: str, step: Step) -> tuple[Path, ...]:
    """Return the files that tell what came of a step."""
    return (job.result(name), job.report(name)) if isinstance(step, Reshard | Validate) else (job.result(name),)


def _find_run_reason(record: Record | None, cache_key: CacheKey, product: str | None) -> str | None:
    """Return why a step is to be run, None where it is done.

    Args:
        record: what is remembered of it.
        cache_key: what it is now.
        product: what there is now of what it wrote.
    """
    if record is None:
        return "it was not run yet"
    if changes := list(_describe_changes(record.meaning, cache_key.fingerprint)):
        return "; ".join(changes)
    if not record.is_done:
        return _UNFINISHED[record.status]
    return None if product == record.product else "what it wrote is no longer there, or was changed"


def _describe_changes(before: Mapping[str, object], now: Mapping[str, object]) -> Iterator[str]:
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) != now.get(name):
            is_files = name.startswith(_FILES_PREFIX)
            yield f"{name} changed" if is_files else f"{name} was {before.get(name)} and is {now.get(name)}"


def _list_tree_files(paths: Sequence[Path], *, verifies: bool) -> Iterator[Path]:
    """Yield the files that a look at source reads: those below the paths, of models beside, and configurations.

    Args:
        paths: to look at.
        verifies: whether the tree's own converter is run, which may import what lies beside it.
    """
    from codemods.files.config import find_project_file
    from codemods.files.sources import find_sources
    from codemods.rewriting.converter import find_converter_root
    from codemods.tree.detect import find_version_file
    from codemods.tree.survey import is_model_path

    models = [path for path in paths if is_model_path(path)]
    beside = [path.parent.parent if path.is_file() else path.parent for path in models]
    yield from find_sources([*paths, *beside], [])
    for find in (find_project_file, find_version_file):
        yield from filter(None, dict.fromkeys(find(path.resolve()) for path in paths))
    if verifies:
        for root in dict.fromkeys(find_converter_root(path.resolve()) for path in paths):
            yield from sorted((root / "utils").glob("*.py"))


def _select_known(written: Stamps, known: Stamps) -> Stamps:
    return {path: stamp for path, stamp in written.items() if path in known}


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digest_stamps(stamps: Stamps) -> str:
    return hashlib.sha256(json.dumps(stamps, sort_keys=True).encode()).hexdigest()
