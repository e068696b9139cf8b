"""Cache keys of steps: a step is skipped if its options, package versions and source files are unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from migrator.jobs.files import Stamps, collect_stamps, is_regular_file, list_files
from migrator.jobs.job import Job, Step
from migrator.jobs.readers import list_external_files
from migrator.jobs.state import Record, Records
from migrator.options.common import require_runtime
from migrator.options.external import is_address
from migrator.settings import Check, Prove, Reshard, Rewrite, Validate, Verify
from plans.dialect_file import is_dialect_file, list_dialect_files

__all__ = [
    "CacheKey",
    "StepState",
    "check_up_to_date",
    "compute_product_digest",
    "find_source_checkpoints",
    "locate_checkpoint",
]

_EXECUTION_OPTIONS = frozenset(("max_memory", "timeout", "overwrite"))
"""Options that affect how a step works but not its result."""
_SOURCES: Mapping[type, tuple[str, ...]] = {
    Reshard: ("source",),
    Verify: ("source", "other"),
    Validate: ("source", "reference"),
}
_PACKAGES: Mapping[type, tuple[str, ...]] = dict.fromkeys((*_SOURCES, Prove), ("torch", "transformers"))
_FILES_PREFIX = "files of "
_UNFINISHED = {"failed": "it failed", "stopped": "it was stopped", "started": "its run was killed"}


@dataclass(frozen=True)
class CacheKey:
    """Everything that determines the result of a step.

    Args:
        options: the step's options by name.
        versions: the versions of the packages that do the work.
        sources: the stamps of the files that it reads, by the checkpoint or tree that they belong to.
    """

    options: Mapping[str, object]
    versions: Mapping[str, str | None]
    sources: Mapping[str, Stamps]

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """The key as plain JSON values by name, as the state file stores it."""
        digests = {f"{_FILES_PREFIX}{name}": _digest_stamps(stamps) for name, stamps in self.sources.items()}
        plain: dict[str, object] = json.loads(json.dumps({**self.options, **self.versions, **digests}, default=str))
        return plain

    def after_writing(self, files: Iterable[Path]) -> CacheKey:
        """Return the key after the step itself has written some of its sources; changes by others still count."""
        written = collect_stamps(files)
        sources = {name: {**stamps, **_select_known(written, stamps)} for name, stamps in self.sources.items()}
        return replace(self, sources=sources)


@dataclass(frozen=True)
class StepState:
    """Whether a step is up to date.

    Args:
        cache_key: the step's current key.
        why: the reason to run it, None if it is up to date.
        is_own_output: whether its destination holds nothing but what this job wrote there, unchanged.
    """

    cache_key: CacheKey
    why: str | None
    is_own_output: bool


def check_up_to_date(job: Job, records: Records, name: str, step: Step) -> StepState:
    """Return whether a step is up to date; of sources that are elsewhere the headers are fetched to find out.

    Args:
        job: the job that the step belongs to.
        records: the records of the job's earlier runs.
        name: the step's name.
        step: the step.

    Raises:
        MigratorError: a source cannot be fetched, or a path does not exist.
    """
    if type(step) in _PACKAGES:
        require_runtime()
    cache_key, record, product = _build_cache_key(step), records.get(name), compute_product_digest(job, name, step)
    why = _find_run_reason(record, cache_key, product)
    if why is None and not all(map(is_regular_file, _list_result_files(job, name, step))):
        why = "its result or report is no longer there"
    is_own_output = record is not None and record.product is not None and product in (None, record.product)
    return StepState(cache_key, why, is_own_output)


def find_source_checkpoints(step: Step) -> tuple[str, ...]:
    """Return the checkpoints that a step reads, folders or addresses."""
    sources = (getattr(step, name) for name in _SOURCES.get(type(step), ()))
    return tuple(source for source in sources if source is not None)


def _build_cache_key(step: Step) -> CacheKey:
    options = {field.name: getattr(step, field.name) for field in fields(step) if field.name not in _EXECUTION_OPTIONS}
    versions = {name: _find_version(name) for name in ("plan-migrator", *_PACKAGES.get(type(step), ()))}
    match step:
        case Rewrite() | Check():
            verifies = isinstance(step, Rewrite) and step.verify
            sources = {"the tree": collect_stamps(_list_tree_files(step.paths, verifies=verifies))}
            named = filter(None, (step.source, step.target))
            sources |= {name: collect_stamps(list_dialect_files(name)) for name in named if is_dialect_file(name)}
        case Prove():
            sources = {"the tree": collect_stamps(_list_tree_files(step.paths, verifies=False))}
            sources |= {str(file): collect_stamps([file]) for file in (step.config, step.sizes) if file is not None}
        case _:
            sources = {
                text: collect_stamps(list_files(locate_checkpoint(text))) for text in find_source_checkpoints(step)
            }
            sources |= {str(file): collect_stamps([file]) for file in list_external_files(step)}
    return CacheKey(options, versions, sources)


def locate_checkpoint(source: str) -> Path:
    """Return a checkpoint's folder; if it is not on a disk, a folder with its headers and with stand-ins for the rest.

    Raises:
        CheckpointError: it cannot be downloaded.
    """
    if not is_address(source):
        return Path(source)
    from runtime.hub import resolve_folder

    return resolve_folder(source, quiet=True, content="headers")


def compute_product_digest(job: Job, name: str, step: Step) -> str | None:
    """Return a digest of the stamps of a step's output files, None if there are none."""
    outputs = (job.result(name), job.patch(name), job.report(name))
    stamps = collect_stamps(list_files(step.destination) if isinstance(step, Reshard) else outputs)
    return _digest_stamps(stamps) if stamps else None


def _list_result_files(job: Job, name: str, step: Step) -> tuple[Path, ...]:
    """Return the files that describe a step's result."""
    return (job.result(name), job.report(name)) if isinstance(step, Reshard | Validate) else (job.result(name),)


def _find_run_reason(record: Record | None, cache_key: CacheKey, product: str | None) -> str | None:
    """Return the reason to run a step, None if it is up to date.

    Args:
        record: the record of its last run, if any.
        cache_key: its current key.
        product: the current digest of its output files.
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
    """Yield the files that rewriting or checking reads: sources below the paths, sibling models, and configurations.

    Args:
        paths: the paths to rewrite or check.
        verifies: whether the tree's own converter is run, which may import modules beside it.
    """
    from codemods.files.config import find_project_file
    from codemods.files.sources import find_sources
    from codemods.rewriting.converter import find_converter_root
    from codemods.tree.release import find_version_file
    from codemods.tree.survey import is_model_path

    models = [path for path in paths if is_model_path(path)]
    siblings = [path.parent.parent if path.is_file() else path.parent for path in models]
    yield from find_sources([*paths, *siblings], [])
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
